//! Sizes and options of a run.

use super::*;

fn options() -> EndToEnd {
    EndToEnd {
        prompts: vec![512, 0],
        generate: vec![128],
        depths: vec![0, 4096],
        methods: vec![("sparcas".into(), MethodSpec::default())],
        plans: vec![],
        repeats: 3,
        warmup: 2,
    }
}

#[test]
fn the_context_holds_the_longest_test() {
    assert_eq!(options().context(), 4096 + 512);
    assert_eq!(EndToEnd { prompts: vec![], ..options() }.context(), 4096 + 128 + 2);
    let huge = EndToEnd { depths: vec![usize::MAX], ..options() };
    assert_eq!(huge.kv_tokens(), usize::MAX);
}

#[test]
fn tests_are_named_as_users_know_them() {
    assert_eq!(name("pp", 512, 0), "pp512");
    assert_eq!(name("tg", 128, 4096), "tg128@d4096");
}

#[test]
fn nothing_to_measure_is_refused() {
    options().validate().unwrap();
    let none = EndToEnd { prompts: vec![0], generate: vec![], ..options() };
    assert!(none.validate().unwrap_err().to_string().contains("nothing to measure"));
    assert!(EndToEnd { repeats: 0, ..options() }.validate().is_err());
}

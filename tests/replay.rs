//! Decode steps that a backend replays as graphs give the bits of steps that it runs op by op. Only CUDA replays.

mod common;

use common::cache::backends;
use common::model::{Model, dense, prompt, sparse};
use longsight::backend::{Backend, open};
use longsight::engine::WantLogits;
use longsight::select::{MethodSpec, Variant};
use std::sync::Arc;

/// Steps that cross three page boundaries and many refreshes of dimensions.
const STEPS: usize = 200;

/// Logits of the steps of two sequences in turn, one of which crosses its method's dense threshold on the way.
fn run(model: &Model, dev: &Arc<dyn Backend>, spec: &MethodSpec) -> Vec<Vec<f32>> {
    let mut engine = model.builder(dev, spec).build().unwrap();
    let tokens = prompt(9, 240);
    let seqs = [30, 10].map(|n| {
        let seq = engine.open_sequence().unwrap();
        engine.prefill(seq, &tokens[..n], WantLogits::None, |_, _| (), |_| true).unwrap();
        seq
    });
    let mut all = Vec::new();
    for step in 0..STEPS {
        let token = tokens[30 + step];
        for seq in seqs {
            all.push(engine.decode(seq, token).unwrap());
        }
    }
    all
}

#[test]
fn replayed_steps_are_the_steps() {
    let model = Model::deep(4);
    let replaying: Vec<_> = backends().into_iter().filter(|b| b.name() == "cuda").collect();
    if replaying.is_empty() {
        eprintln!("not tested: no backend here replays");
    }
    for dev in replaying {
        let methods = [
            dense(),
            MethodSpec { update: Some(4), ..sparse(Variant::SparcasPaper, 64) },
            sparse(Variant::Sparcas, 80),
            MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(Variant::Kascade, 20) },
            sparse(Variant::Sparda, 80),
            sparse(Variant::Window, 40),
        ];
        // The same device, opened with graphs switched off.
        // SAFETY: this program has one test, which reads the environment on this thread only.
        unsafe { std::env::set_var("LONGSIGHT_CUDA_GRAPHS", "off") };
        let plain = open(dev.name()).unwrap();
        // SAFETY: as above.
        unsafe { std::env::remove_var("LONGSIGHT_CUDA_GRAPHS") };
        for spec in methods {
            let before = dev.replayed();
            let (got, want) = (run(&model, &dev, &spec), run(&model, &plain, &spec));
            let replayed = dev.replayed() - before;
            let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{:?}: first step that differs", spec.variant);
            assert_eq!(plain.replayed(), 0);
            // Two sequences; a step has two parts at least. The first two of every kind run one op at a time.
            assert!(replayed > 3 * STEPS as u64, "{:?}: {replayed}", spec.variant);
        }
    }
}

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
fn run(model: &Model, dev: &Arc<dyn Backend>, spec: &MethodSpec, steps: usize) -> Vec<Vec<f32>> {
    let mut engine = model.builder(dev, spec).build().unwrap();
    let tokens = prompt(9, 240);
    let seqs = [30, 10].map(|n| {
        let seq = engine.open_sequence().unwrap();
        engine.prefill(seq, &tokens[..n], WantLogits::None, |_, _| (), |_| true).unwrap();
        seq
    });
    let mut all = Vec::new();
    for step in 0..steps {
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
    for dev in backends() {
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
            // Where nothing is replayed a few steps say so.
            let steps = if dev.name() == "cuda" { STEPS } else { 4 };
            let (got, want) = (run(&model, &dev, &spec, steps), run(&model, &plain, &spec, steps));
            let replayed = dev.replayed() - before;
            let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
            assert_eq!(
                wrong,
                None,
                "{:?} on {}: first step that differs",
                spec.variant,
                dev.name()
            );
            assert_eq!(plain.replayed(), 0);
            match dev.name() {
                // Two sequences; a step has two parts at least. The first two of every kind run one op at a time.
                "cuda" => assert!(replayed > 3 * STEPS as u64, "{:?}: {replayed}", spec.variant),
                _ => assert_eq!(replayed, 0),
            }
        }
    }
}

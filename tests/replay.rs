//! Decode steps that CUDA launches early or replays as graphs give the bits of steps that it runs kernel by kernel.
#![cfg(feature = "cuda")]

mod common;

use common::cache::backends;
use common::model::{Model, dense, prompt, sparse};
use common::{profile, tiny::Tiny};
use longsight::backend::cuda::{CudaBackend, CudaOptions};
use longsight::backend::{Backend, DType, HeadPool};
use longsight::engine::{Engine, WantLogits};
use longsight::select::{MethodSpec, Variant};
use std::sync::Arc;

/// Steps that cross three page boundaries and many refreshes of dimensions.
const STEPS: usize = 200;

/// Logits of the steps of two sequences in turn, with so many tokens to begin with.
fn run(mut engine: Engine, begin: [usize; 2]) -> Vec<Vec<f32>> {
    let tokens = prompt(9, 440);
    let seqs = begin.map(|n| {
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

/// The GPU, where it is required, and the same one with something switched off.
fn both(change: impl Fn(&mut CudaOptions)) -> Option<[Arc<dyn Backend>; 2]> {
    let Some(dev) = backends().into_iter().find(|b| b.name() == "cuda") else {
        eprintln!("not tested: LONGSIGHT_REQUIRE does not list cuda");
        return None;
    };
    let mut options = CudaOptions::from_environment();
    change(&mut options);
    Some([dev, Arc::new(CudaBackend::open_with(0, options).unwrap())])
}

#[test]
fn replayed_steps_are_the_steps() {
    let model = Model::deep(4);
    let Some([dev, plain]) = both(|o| o.graphs = false) else { return };
    let methods = [
        dense(),
        MethodSpec { update: Some(4), ..sparse(Variant::SparcasPaper, 64) },
        sparse(Variant::Sparcas, 80),
        MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(Variant::Kascade, 20) },
        sparse(Variant::Sparda, 80),
        sparse(Variant::Window, 40),
    ];
    for spec in methods {
        // One of the sequences crosses its method's dense threshold on the way.
        let go = |dev| run(model.engine(dev, &spec), [30, 10]);
        let before = dev.replayed();
        let (got, want) = (go(&dev), go(&plain));
        let replayed = dev.replayed() - before;
        let wrong = got.iter().zip(&want).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{:?}: first step that differs", spec.variant);
        assert_eq!(plain.replayed(), 0);
        // Two sequences; a step has two parts at least. The first two of every kind run one op at a time.
        assert!(replayed > 3 * STEPS as u64, "{:?}: {replayed}", spec.variant);
    }
}

/// In 16 bits with heads of 64 dimensions, where the kernels are that read before the one before has ended; a sequence
/// has tiles of settled keys from the first step on.
#[test]
fn steps_that_overlap_are_the_steps() {
    let model = Model::of(&Tiny::wide(3, 4));
    let Some([dev, apart]) = both(|o| o.overlap = false) else { return };
    let on_half =
        |pool| MethodSpec { dims: Some(32), pool: Some(pool), ..sparse(Variant::Sparcas, 64) };
    let methods = [
        dense(),
        on_half(HeadPool::MeanSoftmax),
        on_half(HeadPool::MaxLogit),
        MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(Variant::Kascade, 20) },
    ];
    for dtype in [DType::F16, DType::BF16] {
        for spec in &methods {
            let go = |dev| {
                let builder = model.builder(dev, spec).dtype(dtype).context(512);
                run(builder.key_profile(profile::random(4, 2, 64)).build().unwrap(), [220, 30])
            };
            let (got, want) = (go(&dev), go(&apart));
            let same =
                |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits());
            let wrong = got.iter().zip(&want).position(|(a, b)| !same(a, b));
            assert_eq!(
                wrong, None,
                "{dtype} {:?} {:?}: first step that differs",
                spec.variant, spec.pool
            );
            assert!(got.iter().flatten().all(|x| x.is_finite()), "{dtype} {:?}", spec.variant);
        }
    }
}

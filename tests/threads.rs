//! Threads that share a backend get the bits that each of them gets alone.
//!
//! Ops of several passes keep partial results in memory that all ops of a backend share, and read-backs wait for
//! the same device: both must hold while another thread records ops of its own.

mod common;

use common::cache::{Data, Heads, Layer, Rule, backends, upload};
use longsight::backend::{
    Backend, DType, HeadPool, Linear, LogitScale, PoolScores, ScoreSource, Tensor,
};
use std::sync::{Arc, Barrier};
use std::thread;

const HEADS: Heads = Heads { query: 8, kv: 2, dim: 16 };
const POOLS: [HeadPool; 2] = [HeadPool::MaxSoftmax, HeadPool::MeanSoftmax];
const SOURCE: ScoreSource<'static> = ScoreSource::Lead { n: 8 };

fn rule(pool: HeadPool) -> Rule {
    Rule { pool, scale: LogitScale::Coverage, k: 64, forced: Some((4, 8)) }
}

fn filled(dev: &Arc<dyn Backend>, seed: u64, tokens: usize) -> Layer {
    Layer::filled(dev, &Data::random(seed, HEADS, tokens), 16)
}

fn bytes(dev: &dyn Backend, t: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; t.bytes()];
    dev.download(t, &mut bytes).unwrap();
    bytes
}

/// Runs `work` for each of `mine` alone, then for all of them at once, `rounds` times each.
fn same_together<T: Sync, R: PartialEq + Sync>(
    name: &str,
    mine: &[T],
    rounds: usize,
    work: impl Fn(&T) -> R + Sync,
) {
    let alone: Vec<R> = mine.iter().map(&work).collect();
    assert!(alone[0] != alone[1], "the threads' work must differ");
    let (start, work) = (Barrier::new(mine.len()), &work);
    let run = |(mine, alone): (&T, &R)| {
        start.wait();
        (0..rounds).filter(|_| work(mine) != *alone).count()
    };
    let wrong: Vec<usize> = thread::scope(|scope| {
        let pairs = mine.iter().zip(&alone);
        let threads: Vec<_> = pairs.map(|pair| scope.spawn(move || run(pair))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(wrong, vec![0; mine.len()], "{name}: of {rounds} rounds, those with other bits");
}

/// Many two-pass ops in a row: every one may be met by one of the other thread between its passes.
#[test]
fn ops_of_two_passes_keep_their_partial_results() {
    // Outputs of one round.
    const OUTS: usize = 128;
    for dev in backends() {
        let mine = [(1, 200), (2, 330)].map(|(seed, tokens)| {
            let layer = filled(&dev, seed, tokens);
            let scores = layer.scores(SOURCE, rule(HeadPool::None));
            let outs = layer.alloc(DType::F32, OUTS * HEADS.kv * layer.capacity);
            (layer, scores, outs)
        });
        same_together(dev.name(), &mine, 50, |(layer, scores, outs)| {
            for (i, pool) in (0..OUTS).zip(POOLS.iter().cycle().copied()) {
                let room = HEADS.kv * layer.capacity;
                let out = &outs.slice(i * room, room);
                let (seqs, stride) = (layer.seqs(), layer.capacity);
                let (heads, kv_heads) = (HEADS.query, HEADS.kv);
                let p =
                    PoolScores { scores, out, seqs, heads, kv_heads, stride, pool, lengths: None };
                dev.pool_scores(&p).unwrap();
            }
            bytes(&*dev, outs)
        });
    }
}

/// The op chain of a decode step, read back after each part; lengths on both sides of what one pass takes (4,096
/// tokens on wgpu).
#[test]
fn decode_steps_and_read_backs_get_their_own_bits() {
    for dev in backends() {
        let mine = [1, 2].map(|seed| [4500, 70, 300].map(|n| filled(&dev, seed, n)));
        same_together(dev.name(), &mine, 20, |layers| {
            let one = |layer: &Layer, pool: HeadPool| {
                let scores = bytes(&*dev, &layer.scores(SOURCE, rule(pool)));
                let picked = layer.pick(SOURCE, rule(pool));
                let attended = layer.attend(&picked);
                (scores, picked.lists, attended)
            };
            layers.iter().flat_map(|l| POOLS.map(|pool| one(l, pool))).collect::<Vec<_>>()
        });
    }
}

/// Few outputs of long sums: a library that shares a sum among blocks adds up their parts in a second kernel.
#[test]
fn matrix_products_keep_their_partial_sums() {
    const ROUNDS: usize = 16;
    const SHAPES: [[usize; 3]; 2] = [[16, 4096, 32], [40, 1024, 16]];
    for dev in backends() {
        let alloc = |n| dev.alloc(DType::F32, n, "test").unwrap();
        let mine = [1u32, 2].map(|seed| {
            SHAPES.map(|[rows, inputs, outputs]| {
                let random = |n: usize, salt: u32| {
                    let next =
                        |i: u32| (i.wrapping_mul(2_654_435_761) ^ salt).wrapping_mul(seed) >> 8;
                    let x: Vec<f32> =
                        (0..n as u32).map(|i| next(i) as f32 / (1 << 23) as f32 - 1.0).collect();
                    upload(&*dev, &x)
                };
                let y = alloc(ROUNDS * rows * outputs);
                (random(rows * inputs, 77), random(outputs * inputs, 99), y)
            })
        });
        same_together(dev.name(), &mine, 5, |layers| {
            let mut all = Vec::new();
            for round in 0..ROUNDS {
                for ((x, w, y), [rows, inputs, outputs]) in layers.iter().zip(SHAPES) {
                    let y = &y.slice(round * rows * outputs, rows * outputs);
                    let accumulate = false;
                    let p = Linear { x, w, bias: None, y, rows, inputs, outputs, accumulate };
                    dev.linear(&p).unwrap();
                }
            }
            layers.iter().for_each(|l| all.extend(bytes(&*dev, &l.2)));
            all
        });
    }
}

//! embed, gather_rows, rms_norm, linear, rope, swiglu.

use super::rig::{Outcome, Rig};
use super::{Cases, Types};
use longsight::backend::{
    DType, Embed, GatherRows, Linear, QkNorm, RmsNorm, Rope, SwiGlu, reference,
};

pub fn cases(c: &mut Cases) {
    for (rows, cols, vocab) in [(1, 64, 100), (5, 576, 1000), (130, 96, 333)] {
        let name = format!("rows{rows}_cols{cols}_vocab{vocab}");
        c.add("embed", name, move |rig, t| embed(rig, t, rows, cols, vocab));
    }
    for (n, x_rows, cols) in [(1, 1, 64), (3, 7, 576), (17, 200, 96)] {
        let name = format!("n{n}_of{x_rows}_cols{cols}");
        c.add("gather_rows", &name, move |rig, t| gather_rows(rig, t.act, n, x_rows, cols));
        if c.types.w == DType::F32 {
            let name = format!("words_{name}");
            c.add("gather_rows", name, move |rig, _| gather_rows(rig, DType::U32, n, x_rows, cols));
        }
    }
    for (rows, cols, scale) in
        [(1, 576, 1.0), (3, 64, 1e-3), (17, 2048, 1.0), (130, 96, 100.0), (2, 4099, 1.0)]
    {
        let name = format!("rows{rows}_cols{cols}_scale{scale}");
        c.add("rms_norm", name, move |rig, t| rms_norm(rig, t, rows, cols, scale));
    }
    for (rows, inputs, outputs) in [
        (1, 64, 64),
        (1, 576, 192),
        (3, 576, 17),
        (17, 96, 131),
        (130, 576, 960),
        (1, 1536, 577),
        (2, 8, 1),
        (5, 1000, 30),
        (64, 256, 256),
    ] {
        for (bias, accumulate, wide) in
            [(false, false, false), (true, false, true), (false, true, true), (true, true, true)]
        {
            let l = LinearCase { rows, inputs, outputs, bias, accumulate, wide };
            c.add("linear", l.name(), move |rig, t| linear(rig, t, l));
        }
    }
    for (rows, inputs, ffn) in
        [(1, 64, 64), (1, 576, 1536), (2, 1096, 17), (3, 576, 131), (8, 40, 9), (17, 96, 64)]
    {
        let name = format!("rows{rows}_{ffn}x{inputs}");
        c.add("linear_gated", name, move |rig, t| linear_gated(rig, t, rows, inputs, ffn));
    }
    let vocab = LinearCase {
        rows: 1,
        inputs: 576,
        outputs: 49152,
        bias: false,
        accumulate: false,
        wide: true,
    };
    // 28 million weights: for the two dtypes that models are run in most.
    if c.types.w != DType::F16 {
        c.add("linear", vocab.name(), move |rig, t| linear(rig, t, vocab));
    }
    for (d, heads, per, rows, norm) in [
        (64, 9, 3, 1, false),
        (64, 3, 1, 130, false),
        (128, 32, 4, 3, true),
        (128, 8, 1, 5, true),
        (96, 8, 8, 7, false),
        (80, 4, 1, 2, true),
    ] {
        let name = format!("d{d}_h{heads}_per{per}_rows{rows}{}", if norm { "_norm" } else { "" });
        c.add("rope", name, move |rig, t| rope(rig, t, [d, heads, per, rows], norm));
    }
    for (rows, ffn) in [(1, 1536), (3, 64), (17, 96), (130, 256), (2, 1001)] {
        c.add("swiglu", format!("rows{rows}_ffn{ffn}"), move |rig, t| swiglu(rig, t, rows, ffn));
    }
}

fn embed(rig: &mut Rig, t: Types, rows: usize, cols: usize, vocab: usize) -> Outcome {
    let values = rig.normal(vocab * cols, 1.0);
    let table = rig.input(t.w, &values)?;
    let mut ids: Vec<u32> = (0..rows).map(|_| rig.below(vocab) as u32).collect();
    ids[rows / 2] = vocab as u32 - 1;
    if rows > 2 {
        // Outside the vocabulary: zeros.
        (ids[0], ids[1]) = (vocab as u32, u32::MAX);
    }
    let tokens = rig.words(&ids)?;
    let out = rig.output(DType::F32, rows * cols)?;
    let scale = if rows > 2 { 48.5 } else { 1.0 };
    let p = Embed { tokens: &tokens, table: &table, out: &out, rows, cols, vocab, scale };
    let outs = reference::embed(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.embed(&p))
}

fn gather_rows(rig: &mut Rig, dtype: DType, n: usize, x_rows: usize, cols: usize) -> Outcome {
    let values = match dtype {
        DType::U32 => (0..x_rows * cols).map(|_| rig.below(1 << 32) as f64).collect(),
        _ => rig.normal(x_rows * cols, 1.0),
    };
    let x = rig.input(dtype, &values)?;
    let mut list: Vec<u32> = (0..n).map(|_| rig.below(x_rows) as u32).collect();
    list[n - 1] = x_rows as u32 - 1;
    let rows = rig.words(&list)?;
    let out = rig.output(dtype, n * cols)?;
    let p = GatherRows { x: &x, rows: &rows, out: &out, n, x_rows, cols };
    let outs = reference::gather_rows(&p, &*rig.dev)?;
    rig.check(dtype, &outs, &|dev| dev.gather_rows(&p))
}

fn rms_norm(rig: &mut Rig, t: Types, rows: usize, cols: usize, scale: f64) -> Outcome {
    let mut values = rig.normal(rows * cols, scale);
    if rows > 1 {
        // A row of zeros stays zero: eps keeps the quotient finite.
        values[cols..2 * cols].fill(0.0);
    }
    let x = rig.input(DType::F32, &values)?;
    let values = rig.normal(cols, 1.0);
    let weight = rig.input(DType::F32, &values)?;
    let out = rig.output(t.act, rows * cols)?;
    let p = RmsNorm { x: &x, weight: &weight, out: &out, rows, cols, eps: 1e-5 };
    let outs = reference::rms_norm(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.rms_norm(&p))
}

#[derive(Clone, Copy)]
struct LinearCase {
    rows: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
    accumulate: bool,
    /// f32 output.
    wide: bool,
}

impl LinearCase {
    fn name(&self) -> String {
        let flag = |on: bool, name: &'static str| if on { name } else { "" };
        format!(
            "rows{}_{}x{}{}{}{}",
            self.rows,
            self.outputs,
            self.inputs,
            flag(self.bias, "_bias"),
            flag(self.accumulate, "_acc"),
            flag(!self.wide, "_act")
        )
    }
}

fn linear(rig: &mut Rig, t: Types, l: LinearCase) -> Outcome {
    let values = rig.normal(l.rows * l.inputs, 1.0);
    let x = rig.input(t.act, &values)?;
    let values = rig.normal(l.outputs * l.inputs, 1.0 / (l.inputs as f64).sqrt());
    let w = rig.input(t.w, &values)?;
    let bias = match l.bias {
        true => {
            let values = rig.normal(l.outputs, 1.0);
            Some(rig.input(DType::F32, &values)?)
        }
        false => None,
    };
    let dtype = if l.wide { DType::F32 } else { t.act };
    let y = match l.accumulate {
        true => {
            let values = rig.normal(l.rows * l.outputs, 1.0);
            rig.input(dtype, &values)?
        }
        false => rig.output(dtype, l.rows * l.outputs)?,
    };
    let p = Linear {
        x: &x,
        w: &w,
        bias: bias.as_ref(),
        y: &y,
        rows: l.rows,
        inputs: l.inputs,
        outputs: l.outputs,
        accumulate: l.accumulate,
    };
    let outs = reference::linear(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.linear(&p))
}

/// Of `groups` KV heads of `d` dimensions, each with its own order of the pairs.
pub(super) fn frequencies(rig: &mut Rig, groups: usize, d: usize) -> Vec<f64> {
    let of = |i: usize| 1e4f64.powf(-2.0 * i as f64 / d as f64);
    (0..groups).flat_map(|_| rig.shuffled(d / 2)).map(of).collect()
}

fn rope(rig: &mut Rig, t: Types, [d, heads, per, rows]: [usize; 4], norm: bool) -> Outcome {
    // The rows of a fused QKV projection: others' values (NaN here) lie between them.
    let x_stride = heads * d + 64;
    let mut values = vec![f64::NAN; (rows - 1) * x_stride + heads * d];
    for r in 0..rows {
        values[r * x_stride..][..heads * d].copy_from_slice(&rig.normal(heads * d, 1.0));
    }
    let x = rig.input(t.act, &values)?;
    let far = [0, 1, 40_000, 131_071];
    let at: Vec<u32> =
        (0..rows).map(|r| far.get(r).copied().unwrap_or_else(|| rig.below(9000) as u32)).collect();
    let positions = rig.words(&at)?;
    let freq = frequencies(rig, heads / per, d);
    let inv_freq = rig.input(DType::F32, &freq)?;
    let values: Vec<f64> = rig.normal(heads * d, 0.3).iter().map(|w| 1.0 + w).collect();
    let weight = rig.input(DType::F32, &values)?;
    let out = rig.output(t.act, rows * heads * d)?;
    let p = Rope {
        x: &x,
        x_stride,
        positions: &positions,
        inv_freq: &inv_freq,
        heads_per_freq: per,
        norm: norm.then_some(QkNorm { weight: &weight, eps: 1e-6 }),
        // LongRoPE's for four times the context of 32,768 tokens, in half of the cases.
        factor: if per == 1 { 1.0645 } else { 1.0 },
        out: &out,
        rows,
        heads,
        head_dim: d,
    };
    let outs = reference::rope(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.rope(&p))?;
    // Together with one of another width, without the norm.
    let last = rig.output(t.act, rows * d)?;
    let values = rig.normal(rows * d, 1.0);
    let tail = rig.input(t.act, &values)?;
    let freqs = rig.input(DType::F32, &freq[..d / 2])?;
    let one = Rope {
        x: &tail,
        x_stride: d,
        inv_freq: &freqs,
        heads_per_freq: 1,
        norm: None,
        out: &last,
        heads: 1,
        ..p
    };
    let mut outs = reference::rope(&p, &*rig.dev)?;
    outs.extend(reference::rope(&one, &*rig.dev)?);
    rig.check(t.act, &outs, &|dev| dev.rope_both([&p, &one]))
}

fn linear_gated(rig: &mut Rig, t: Types, rows: usize, inputs: usize, ffn: usize) -> Outcome {
    let values = rig.normal(rows * inputs, 1.0);
    let x = rig.input(t.act, &values)?;
    let values = rig.normal(2 * ffn * inputs, 1.0 / (inputs as f64).sqrt());
    let w = rig.input(t.w, &values)?;
    let product = rig.output(t.act, rows * 2 * ffn)?;
    let out = rig.output(t.act, rows * ffn)?;
    let l = Linear {
        x: &x,
        w: &w,
        bias: None,
        y: &product,
        rows,
        inputs,
        outputs: 2 * ffn,
        accumulate: false,
    };
    let p = SwiGlu { x: &product, out: &out, rows, ffn };
    let outs = reference::linear_gated(&l, &p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.linear_gated(&l, &p))
}

fn swiglu(rig: &mut Rig, t: Types, rows: usize, ffn: usize) -> Outcome {
    let mut values = rig.normal(rows * 2 * ffn, 2.0);
    // Far ends of the sigmoid: no overflow to NaN. The factor keeps one value from ruling the tensor's norm.
    (values[0], values[1]) = (-200.0, 200.0);
    values[ffn + 1] = 0.01;
    let x = rig.input(t.act, &values)?;
    let out = rig.output(t.act, rows * ffn)?;
    let p = SwiGlu { x: &x, out: &out, rows, ffn };
    let outs = reference::swiglu(&p, &*rig.dev)?;
    rig.check(t.act, &outs, &|dev| dev.swiglu(&p))
}

//! The dense family.

use super::{Cell, Output, floats, words};
use crate::backend::{Backend, Embed, GatherRows, Linear, Result, RmsNorm, Rope, SwiGlu};
use rayon::prelude::*;

/// See [`Embed`].
pub fn embed<'a>(p: &Embed<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (tokens, table) = (words(dev, p.tokens)?, floats(dev, p.table)?);
    let mut out = Output::exact("embed", "out", p.out);
    for (r, t) in tokens[..p.rows].iter().map(|t| *t as usize).enumerate() {
        match t < p.vocab {
            true => {
                let row = &table[t * p.cols..(t + 1) * p.cols];
                let scaled: Vec<f64> = row.iter().map(|x| x * f64::from(p.scale)).collect();
                out.put(r * p.cols, &scaled);
            }
            false => out.put(r * p.cols, &vec![0.0; p.cols]),
        }
    }
    Ok(vec![out])
}

/// See [`GatherRows`].
pub fn gather_rows<'a>(p: &GatherRows<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (rows, x) = (words(dev, p.rows)?, floats(dev, p.x)?);
    let mut out = Output::exact("gather_rows", "out", p.out);
    for (i, r) in rows[..p.n].iter().map(|r| *r as usize).enumerate() {
        out.put(i * p.cols, &x[r * p.cols..(r + 1) * p.cols]);
    }
    Ok(vec![out])
}

fn normalised(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let r = (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(v, w)| v / r * w).collect()
}

/// See [`RmsNorm`].
pub fn rms_norm<'a>(p: &RmsNorm<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (x, weight) = (floats(dev, p.x)?, floats(dev, p.weight)?);
    let mut out = Output::new("rms_norm", "out", p.out);
    for (r, row) in x.chunks_exact(p.cols).take(p.rows).enumerate() {
        out.put(r * p.cols, &normalised(row, &weight, p.eps));
    }
    Ok(vec![out])
}

/// See [`Linear`].
pub fn linear<'a>(p: &Linear<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (x, w) = (floats(dev, p.x)?, floats(dev, p.w)?);
    let bias = p.bias.map(|b| floats(dev, b)).transpose()?;
    let old = if p.accumulate { Some(floats(dev, p.y)?) } else { None };
    let mut out = Output::new("linear", "y", p.y);
    out.cells[..p.rows * p.outputs].par_iter_mut().enumerate().for_each(|(at, cell)| {
        let (r, o) = (at / p.outputs, at % p.outputs);
        let (x, w) = (&x[r * p.inputs..][..p.inputs], &w[o * p.inputs..][..p.inputs]);
        let dot: f64 = x.iter().zip(w).map(|(a, b)| a * b).sum();
        let bias = bias.as_ref().map_or(0.0, |b| b[o]);
        *cell = Cell::Is(dot + bias + old.as_ref().map_or(0.0, |y| y[at]));
    });
    Ok(vec![out])
}

/// See [`Rope`]. The angle is the f32 product, as the parameter struct says; the rest is f64.
pub fn rope<'a>(p: &Rope<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (x, positions) = (floats(dev, p.x)?, words(dev, p.positions)?);
    let freq = floats(dev, p.inv_freq)?;
    let norm = p.norm.as_ref().map(|n| Ok((floats(dev, n.weight)?, n.eps))).transpose()?;
    let d = p.head_dim;
    let mut out = Output::new("rope", "out", p.out);
    for r in 0..p.rows {
        for h in 0..p.heads {
            let mut v = x[r * p.x_stride + h * d..][..d].to_vec();
            if let Some((weight, eps)) = &norm {
                v = normalised(&v, &weight[h * d..][..d], *eps);
            }
            for i in 0..d / 2 {
                let f = freq[h / p.heads_per_freq * (d / 2) + i] as f32;
                let (sin, cos) = f64::from(positions[r] as f32 * f).sin_cos();
                let factor = f64::from(p.factor);
                let (sin, cos) = (sin * factor, cos * factor);
                let (a, b) = (v[2 * i], v[2 * i + 1]);
                v[2 * i] = a * cos - b * sin;
                v[2 * i + 1] = b * cos + a * sin;
            }
            out.put((r * p.heads + h) * d, &v);
        }
    }
    Ok(vec![out])
}

/// See [`Backend::linear_gated`].
pub fn linear_gated<'a>(
    l: &Linear<'a>,
    p: &SwiGlu<'a>,
    dev: &dyn Backend,
) -> Result<Vec<Output<'a>>> {
    let mut product = linear(l, dev)?;
    let mut out = Output::new("linear_gated", "out", p.out);
    for x in &mut product {
        let value = |c: &Cell| if let Cell::Is(v) = c { *v } else { f64::NAN };
        for (r, row) in x.cells.chunks_exact(2 * p.ffn).take(p.rows).enumerate() {
            let (gate, up) = row.split_at(p.ffn);
            let gated = gate.iter().zip(up).map(|(z, u)| (value(z), value(u)));
            let y: Vec<f64> = gated.map(|(z, u)| z / (1.0 + (-z).exp()) * u).collect();
            out.put(r * p.ffn, &y);
        }
        x.cells.fill(Cell::Any);
    }
    product.push(out);
    Ok(product)
}

/// See [`SwiGlu`].
pub fn swiglu<'a>(p: &SwiGlu<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let x = floats(dev, p.x)?;
    let mut out = Output::new("swiglu", "out", p.out);
    for (r, row) in x.chunks_exact(2 * p.ffn).take(p.rows).enumerate() {
        let (gate, up) = row.split_at(p.ffn);
        let y: Vec<f64> = gate.iter().zip(up).map(|(z, u)| z / (1.0 + (-z).exp()) * u).collect();
        out.put(r * p.ffn, &y);
    }
    Ok(vec![out])
}

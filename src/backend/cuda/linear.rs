//! Linear layers: own kernels for few rows, cuBLASLt or own tiles for many.

use super::CudaBackend;
use super::args::word;
use super::blas::Product;
use super::launch::{Args, Shape};
use super::replay::Node;
use crate::backend::ops::check_gated;
use crate::backend::{DType, Linear, Result, SwiGlu};
use bytemuck::{Pod, Zeroable};

/// `LinearArgs` of `linear.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinearArgs {
    x: u64,
    w: u64,
    bias: u64,
    y: u64,
    rows: u32,
    inputs: u32,
    outputs: u32,
    y_f32: u32,
    accumulate: u32,
    pad: u32,
}

const OP: &str = "linear";
/// Rows up to which the weights' bandwidth is the limit.
const FEW: usize = 8;
/// Outputs of one block of the few-rows kernel: 4 warps of 2.
const VEC_OUTPUTS: usize = 8;
/// Tile edge of the kernels for many rows.
const TILE: usize = 64;

impl CudaBackend {
    /// Few rows in 16 bits: `swiglu` is part of the product.
    pub(super) fn linear_gated_op(&self, p: &Linear<'_>, s: &SwiGlu<'_>) -> Result<()> {
        const OP: &str = "linear_gated";
        check_gated(p, s)?;
        let dtype = p.x.dtype();
        let alike = p.w.dtype() == dtype && s.out.dtype() == dtype && dtype != DType::F32;
        if !alike || !(1..=FEW).contains(&p.rows) {
            self.linear_op(p)?;
            return self.swiglu_op(s);
        }
        let args = LinearArgs {
            x: self.ptr(OP, p.x)?,
            w: self.ptr(OP, p.w)?,
            y: self.ptr(OP, s.out)?,
            rows: word(OP, "rows", p.rows)?,
            inputs: word(OP, "inputs", p.inputs)?,
            outputs: word(OP, "ffn", s.ffn)?,
            ..LinearArgs::zeroed()
        };
        let entry = format!("linear_gated_{dtype}_r{}", p.rows.next_power_of_two());
        let shape = Shape::new([s.ffn.div_ceil(VEC_OUTPUTS / 2), 1, 1], 128);
        self.launch("linear", &entry, shape, Args::new().with(args))
    }

    pub(super) fn linear_op(&self, p: &Linear<'_>) -> Result<()> {
        p.check()?;
        let (x, w, y) = (p.x.dtype(), p.w.dtype(), p.y.dtype());
        if x != w && x != DType::F32 {
            return Err(self.unsupported(OP, format!("{x} activations with {w} weights")));
        }
        if y != DType::F32 && y != x {
            return Err(self.unsupported(OP, format!("{y} output of {x} activations")));
        }
        let args = LinearArgs {
            x: self.ptr(OP, p.x)?,
            w: self.ptr(OP, p.w)?,
            bias: p.bias.map_or(Ok(0), |b| self.ptr(OP, b))?,
            y: self.ptr(OP, p.y)?,
            rows: word(OP, "rows", p.rows)?,
            inputs: word(OP, "inputs", p.inputs)?,
            outputs: word(OP, "outputs", p.outputs)?,
            y_f32: u32::from(y == DType::F32),
            accumulate: u32::from(p.accumulate),
            pad: 0,
        };
        if p.rows == 0 || p.outputs == 0 {
            return Ok(());
        }
        if p.rows <= FEW {
            let entry = format!("linear_vec_{x}_{w}_r{}", p.rows.next_power_of_two());
            let shape = Shape::new([p.outputs.div_ceil(VEC_OUTPUTS), 1, 1], 128);
            return self.launch(OP, &entry, shape, Args::new().with(args));
        }
        if x == w && p.inputs > 0 && self.product(p, &args)? {
            return Ok(());
        }
        let grid = [p.outputs.div_ceil(TILE), p.rows.div_ceil(TILE), 1];
        let (entry, block) = match x {
            DType::F32 => (format!("linear_simt_{x}_{w}"), 256),
            _ => (format!("linear_mma_{x}"), 128),
        };
        self.launch(OP, &entry, Shape::new(grid, block), Args::new().with(args))
    }

    /// Through cuBLASLt; false when it is missing or has nothing for this shape.
    fn product(&self, p: &Linear<'_>, args: &LinearArgs) -> Result<bool> {
        let Some(blas) = &self.blas else { return Ok(false) };
        let product = Product {
            input: p.x.dtype(),
            output: p.y.dtype(),
            rows: p.rows,
            inputs: p.inputs,
            outputs: p.outputs,
            accumulate: p.accumulate,
        };
        if !blas.takes(product)? {
            return Ok(false);
        }
        self.submit(Node::Product { product, x: args.x, w: args.w, y: args.y })?;
        if p.bias.is_some() {
            let shape = Shape::new([p.outputs.div_ceil(256), p.rows.min(4096), 1], 256);
            let entry = format!("linear_bias_{}", p.x.dtype());
            self.launch(OP, &entry, shape, Args::new().with(*args))?;
        }
        Ok(true)
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "linear" "LinearArgs" LinearArgs,
}

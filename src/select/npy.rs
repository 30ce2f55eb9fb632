//! Head maps as the authors of Kascade publish them: a NumPy array `[layers, kv_heads]` of little-endian i32.

use super::{Anchors, MethodSpec, ModelShape, Plan, Role, SelectError, Variant};

fn bad(reason: impl Into<String>) -> SelectError {
    SelectError::BadHeadMaps { reason: reason.into() }
}

/// The maps of all layers, `[layers][kv_heads]`, from the bytes of a `.npy` file (format 1.0 or 2.0, `<i4`, C order).
///
/// # Errors
/// [`SelectError::BadHeadMaps`] with what is wrong: not such a file, another type or order, sizes that do not fit the
/// length, entries that are no list number.
pub fn read_head_maps(bytes: &[u8]) -> Result<Vec<Vec<u8>>, SelectError> {
    let (layers, kv_heads, data) = array(bytes)?;
    if kv_heads == 0 {
        return Err(bad("no KV heads"));
    }
    let entry = |b: &[u8]| {
        let value = i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        u8::try_from(value).map_err(|_| bad(format!("{value} is no number of a token list")))
    };
    let entries = data.chunks_exact(4).map(entry).collect::<Result<Vec<_>, _>>()?;
    let maps: Vec<Vec<u8>> = entries.chunks_exact(kv_heads).map(<[u8]>::to_vec).collect();
    debug_assert_eq!(maps.len(), layers);
    Ok(maps)
}

/// Rows, columns and data of a two-dimensional array of i32.
fn array(bytes: &[u8]) -> Result<(usize, usize, &[u8]), SelectError> {
    const MAGIC: &[u8] = b"\x93NUMPY";
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("this is no .npy file"))?;
    let short = || bad("the file ends inside its header");
    let word = |at: usize| rest.get(at).copied().map(usize::from).ok_or_else(short);
    // Version, then the length of the header: two bytes in format 1.0, four in 2.0.
    let (len, start): (usize, usize) = match word(0)? {
        1 => (word(2)? | word(3)? << 8, 4),
        2 => (word(2)? | word(3)? << 8 | word(4)? << 16 | word(5)? << 24, 6),
        v => return Err(bad(format!("version {v} of the .npy format is not read"))),
    };
    let end = start.checked_add(len).ok_or_else(short)?;
    let header = rest.get(start..end).ok_or_else(short)?;
    let header = std::str::from_utf8(header).map_err(|_| bad("the header is no text"))?;
    let value = |key: &str| {
        let (_, value) = header.split_once(&format!("'{key}':"))?;
        Some(value.trim_start())
    };
    if !value("descr").is_some_and(|v| v.starts_with("'<i4'")) {
        return Err(bad("the numbers must be little-endian i32 ('<i4')"));
    }
    if !value("fortran_order").is_some_and(|v| v.starts_with("False")) {
        return Err(bad("rows must be stored one after the other (fortran_order False)"));
    }
    let shape = value("shape").and_then(|v| v.strip_prefix('(')?.split_once(')'));
    let shape = shape.ok_or_else(|| bad("the header names no shape"))?.0;
    let sizes = shape.split(',').map(str::trim).filter(|s| !s.is_empty()).map(str::parse);
    let sizes: Vec<usize> =
        sizes.collect::<Result<_, _>>().map_err(|_| bad(format!("({shape}) is no shape")))?;
    let [rows, columns] = sizes[..] else {
        return Err(bad(format!("({shape}) is no shape of layers by KV heads")));
    };
    let data = &rest[end..];
    match rows.checked_mul(columns).and_then(|n| n.checked_mul(4)) {
        Some(n) if n == data.len() => Ok((rows, columns, data)),
        _ => Err(bad(format!("{} bytes of numbers for a shape of ({shape})", data.len()))),
    }
}

impl Plan {
    /// The plan of Kascade with these anchors and the maps of [`read_head_maps`]; `spec` gives what else there is to
    /// choose. The maps of anchors are not read.
    ///
    /// # Errors
    /// [`SelectError::BadHeadMaps`] for maps of another model, [`SelectError::BadPlan`].
    pub fn with_head_maps(
        spec: &MethodSpec,
        maps: &[Vec<u8>],
        m: &ModelShape<'_>,
        context: usize,
    ) -> Result<Plan, SelectError> {
        if spec.variant != Variant::Kascade || !matches!(spec.anchors, Some(Anchors::Layers(_))) {
            return Err(bad(
                "they belong to the method kascade and a list of anchors (0+2+8+13+14)",
            ));
        }
        let mut plan = spec.plan(m, context)?;
        if maps.len() != plan.layers.len() {
            let (maps, layers) = (maps.len(), plan.layers.len());
            return Err(bad(format!("they are for {maps} layers, the model has {layers}")));
        }
        for (layer, map) in plan.layers.iter_mut().zip(maps) {
            if let Role::Reuse { head_map, .. } = &mut layer.role {
                head_map.clone_from(map);
            }
        }
        plan.check(m)?;
        Ok(plan)
    }
}

#[cfg(test)]
#[path = "tests/npy.rs"]
mod tests;

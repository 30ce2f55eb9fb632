//! Every shader validates as WGSL with its shared parts in front of it, and its binding table fits.

use super::*;
use naga::valid::{Capabilities, ValidationFlags, Validator};

fn kernels() -> Vec<&'static Kernel> {
    vec![
        &EMBED,
        &GATHER_ROWS,
        &RMS_NORM,
        &MATVEC,
        &MATMUL,
        &MATMUL_ROWS,
        &ROPE,
        &SWIGLU,
        &KV_APPEND,
        &KV_APPEND_INT8,
        &KV_APPEND_SLICE,
        &KEY_STATS,
        &KV_SUMMARIES,
        &SELECT_DIMS,
        &REBUILD_SLICE,
        &QUANTISE_KEYS,
        &QUANTISE_MARK,
        &SCORE_DIMS,
        &POOL_PARTIALS,
        &SCORE_TILES,
        &POOL_SCORES,
        &SCORE_ROWS,
        &SCORE_TILES,
        &SCORE_SUMMARIES,
        &POOL_BLOCKS_TOTALS,
        &POOL_BLOCKS,
        &EXPAND_BLOCKS,
        &UNION_RANKS_PLACES,
        &UNION_RANKS,
        &HOLD_LISTS,
        &CONTENT_BIAS,
        &FORCE_BLOCKS,
        &FORCE,
        &FORCE_LISTED,
        &PROJECT_QUERIES,
        &PROJECT_KEYS,
        &PROJECT_MARK,
        &TRIM_MASS,
        &TRIM_TOGETHER,
        &TOP_K,
        &ATTEND_DECODE,
        &ATTEND_PREFILL,
        &ATTEND_ROWS,
        &MERGE,
        &MEAN_VALUE,
        &BANDWIDTH,
    ]
}

#[test]
fn shaders_validate_and_declare_their_bindings() {
    for k in kernels() {
        let source = k.parts.concat();
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{}: {}", k.op, e.emit_to_string(&source)));
        Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32)
            .validate(&module)
            .unwrap_or_else(|e| panic!("{}: {}", k.op, e.emit_to_string(&source)));
        assert!(module.entry_points.iter().any(|e| e.name == k.entry), "{} {}", k.op, k.entry);
        for &(slot, access) in k.bindings {
            let declared = module.global_variables.iter().any(|(_, v)| {
                let here = v.binding.is_some_and(|b| b.binding == slot);
                let write = match v.space {
                    naga::AddressSpace::Storage { access } => {
                        access.contains(naga::StorageAccess::STORE)
                    }
                    _ => return false,
                };
                here && write == (access == Access::Write)
            });
            assert!(declared, "{} {}: binding {slot} is not declared so", k.op, k.entry);
        }
    }
}

/// Every shader file belongs to an op or is a shared part.
#[test]
fn every_shader_file_is_compiled() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/shaders");
    for file in std::fs::read_dir(dir).expect("shaders/").flatten() {
        let text = std::fs::read_to_string(file.path()).expect("a shader");
        let used = kernels().iter().any(|k| k.parts.contains(&text.as_str()));
        assert!(used, "{:?} is part of no kernel", file.file_name());
    }
}

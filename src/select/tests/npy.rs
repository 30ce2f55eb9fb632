//! The published maps, rebuilt from their digits, and files that are none.

use super::*;

/// Layers and digits of Llama 3.1 8B; anchors 0, 2, 8, 13 and 14 have the identity.
const LLAMA: &str = "
 1:00000000  3:11111141  4:11111112  5:11511121  6:11112116  7:11121111  9:71563333 10:23503333 11:57135335 12:51115111
15:32266164 16:52026452 17:62222673 18:66625725 19:42262262 20:42642372 21:42662213 22:52672624 23:27272562 24:22627552
25:25252222 26:42252265 27:24222566 28:22222222 29:22222222 30:62222242 31:22226622";
/// The same of Qwen3 8B; anchors 0, 2, 7, 14 and 23.
const QWEN: &str = "
 1:11111111  3:65371455  4:01555113  5:44134554  6:44444644  8:30335600  9:33501001 10:33030000 11:03103330 12:60000060
13:03150005 15:41364054 16:64044142 17:41746330 18:04434444 19:45235534 20:22223332 21:03304344 22:42000300 24:51136107
25:00304661 26:06015773 27:06007116 28:10551100 29:11111016 30:00106010 31:61010401 32:11106600 33:61111101 34:10406001
35:00000000";

fn maps(digits: &str, layers: usize) -> Vec<Vec<u8>> {
    let mut maps = vec![(0..8).collect::<Vec<u8>>(); layers];
    for row in digits.split_whitespace() {
        let (layer, map) = row.split_once(':').unwrap();
        maps[layer.parse::<usize>().unwrap()] = map.bytes().map(|b| b - b'0').collect();
    }
    maps
}

/// A file of format 1.0 with this header text and these numbers.
fn file(header: &str, numbers: &[i32]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    // Padded so that the numbers start at a multiple of 64 bytes.
    let len = (10 + header.len() + 1).next_multiple_of(64) - 10;
    bytes.extend((len as u16).to_le_bytes());
    bytes.extend(format!("{header:<0$}\n", len - 1).into_bytes());
    bytes.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    bytes
}

fn npy(maps: &[Vec<u8>]) -> Vec<u8> {
    let shape = format!("({}, {})", maps.len(), maps[0].len());
    let header = format!("{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}");
    file(&header, &maps.concat().iter().map(|&e| i32::from(e)).collect::<Vec<_>>())
}

#[test]
fn the_published_maps_are_read_back() {
    for (digits, layers, size) in [(LLAMA, 32, 1152), (QWEN, 36, 1280)] {
        let want = maps(digits, layers);
        let bytes = npy(&want);
        assert_eq!(bytes.len(), size);
        assert_eq!(read_head_maps(&bytes).unwrap(), want);
    }
}

#[test]
fn they_make_a_plan() {
    let maps = maps(LLAMA, 32);
    let windows = [None; 32];
    let m = ModelShape {
        model: "m",
        windows: &windows,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        importance: None,
    };
    let plan = |spec: &str, maps: &[Vec<u8>], m: &ModelShape<'_>| {
        Plan::with_head_maps(&spec.parse().unwrap(), maps, m, 32_768)
    };
    const SPEC: &str = "kascade:anchors=0+2+8+13+14";
    let good = plan(SPEC, &maps, &m).unwrap();
    for (l, layer) in good.layers.iter().enumerate() {
        let from = [14, 13, 8, 2, 0].into_iter().find(|a| *a <= l).unwrap();
        let want = match (l, l == from) {
            (0, _) => Role::DenseAnchor,
            (_, true) => Role::Select,
            _ => Role::Reuse { from, head_map: maps[l].clone(), refine: None },
        };
        assert_eq!(layer.role, want, "layer {l}");
    }
    let reason = |r: Result<Plan, SelectError>| r.unwrap_err().to_string();
    assert!(reason(plan("kascade:anchors=5", &maps, &m)).contains("list of anchors"));
    assert!(reason(plan("sparcas", &maps, &m)).contains("method kascade"));
    assert!(reason(plan(SPEC, &maps[1..], &m)).contains("31 layers, the model has 32"));
    let fewer = ModelShape { kv_heads: 4, ..m };
    assert!(reason(plan(SPEC, &maps, &fewer)).contains("8 entries for 4 KV heads"));
    let mut wrong = maps.clone();
    wrong[1][0] = 8;
    assert!(reason(plan(SPEC, &wrong, &m)).contains("names list 8"));
}

#[test]
fn other_files_are_refused_with_the_reason() {
    let good = "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2), }";
    let numbers = [0, 1, 1, 0];
    read_head_maps(&file(good, &numbers)).unwrap();
    let with = |from: &str, to: &str| file(&good.replace(from, to), &numbers);
    for (bytes, part) in [
        (b"PK\x03\x04".to_vec(), "no .npy file"),
        (file(good, &numbers)[..9].to_vec(), "ends inside"),
        (file(good, &numbers)[..40].to_vec(), "ends inside"),
        (b"\x93NUMPY\x03\x00\x10\x00".to_vec(), "version 3"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "ends inside"),
        (with("<i4", "<f4"), "'<i4'"),
        (with("False", "True"), "fortran_order"),
        (with("(2, 2)", "(4,)"), "no shape of layers"),
        (with("(2, 2)", "(2, 3)"), "16 bytes of numbers"),
        (with("(2, 2)", "(2, x)"), "no shape"),
        (with("(2, 2)", "(4611686018427387904, 4)"), "16 bytes of numbers"),
        (with("'shape'", "'form'"), "names no shape"),
        (with("(2, 2)", "(4, 0)"), "16 bytes of numbers"),
        (file(&good.replace("(2, 2)", "(4, 0)"), &[]), "no KV heads"),
        (file(good, &[0, 256, 0, 0]), "256 is no number"),
        (file(good, &[0, 1, -1, 0]), "-1 is no number"),
    ] {
        let e = read_head_maps(&bytes).unwrap_err().to_string();
        assert!(e.contains(part), "{part}: {e}");
    }
}

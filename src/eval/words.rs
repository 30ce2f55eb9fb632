//! Words, numbers and UUIDs of the tasks.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// The line of haystacks that say nothing.
pub const FILLER: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";

const ADJECTIVES: &[&str] = &[
    "able", "ample", "amber", "ancient", "autumn", "bitter", "bold", "brave", "bright", "brisk",
    "broad", "calm", "careful", "cheerful", "clear", "clever", "coarse", "cold", "common", "crisp",
    "curious", "damp", "dark", "deep", "dense", "distant", "dry", "dull", "eager", "early",
    "elder", "empty", "even", "faint", "fair", "famous", "fancy", "fierce", "final", "firm",
    "flat", "fond", "formal", "frank", "fresh", "frozen", "gentle", "giant", "glad", "golden",
    "grand", "grave", "green", "happy", "hardy", "heavy", "hidden", "hollow", "honest", "humble",
    "idle", "inner", "keen", "kind", "late", "lively", "lonely", "loud", "lucky", "mellow",
    "merry", "mild", "modest", "narrow", "neat", "noble", "noisy", "northern", "odd", "outer",
];

const NOUNS: &[&str] = &[
    "acorn", "anchor", "apron", "arrow", "badge", "barrel", "basket", "beacon", "bell", "bench",
    "bottle", "branch", "bridge", "bucket", "button", "cabin", "candle", "canyon", "carpet",
    "castle", "cellar", "chapel", "circle", "cliff", "cloak", "comet", "copper", "corner",
    "cradle", "crown", "curtain", "desert", "dragon", "drawer", "engine", "falcon", "feather",
    "fiddle", "forest", "fountain", "garden", "glacier", "hammer", "harbour", "harvest", "helmet",
    "island", "jacket", "kettle", "ladder", "lantern", "laurel", "ledger", "lemon", "letter",
    "linen", "marble", "meadow", "mirror", "mountain", "needle", "orchard", "oyster", "paddle",
    "parcel", "pebble", "pepper", "pillow", "pistol", "planet", "pocket", "prairie", "quarry",
    "ribbon", "river", "saddle", "saffron", "shadow", "signal", "silver", "spider", "stable",
    "summit", "temple", "thimble", "thunder", "timber", "tower", "trumpet", "tunnel", "valley",
    "velvet", "village", "violin", "wagon", "walnut", "whistle", "willow", "window", "winter",
];

/// One of a list.
pub fn pick<'a, X>(rng: &mut ChaCha8Rng, from: &'a [X]) -> &'a X {
    &from[rng.random_range(0..from.len())]
}

/// In random order (Fisher and Yates).
pub fn shuffle<X>(rng: &mut ChaCha8Rng, all: &mut [X]) {
    for i in (1..all.len()).rev() {
        all.swap(i, rng.random_range(0..=i));
    }
}

/// An adjective and a noun.
pub fn word(rng: &mut ChaCha8Rng) -> String {
    format!("{}-{}", pick(rng, ADJECTIVES), pick(rng, NOUNS))
}

/// Seven digits.
pub fn number(rng: &mut ChaCha8Rng) -> String {
    rng.random_range(1_000_000u32..10_000_000).to_string()
}

/// A UUID of version 4.
pub fn uuid(rng: &mut ChaCha8Rng) -> String {
    let x: u128 = rng.random();
    let x = x & !(0xf << 76) & !(0b11 << 62) | (4 << 76) | (0b10 << 62);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        x >> 96,
        x >> 80 & 0xffff,
        x >> 64 & 0xffff,
        x >> 48 & 0xffff,
        x & 0xffff_ffff_ffff
    )
}

/// `n` different results of `make`.
pub fn different(
    rng: &mut ChaCha8Rng,
    n: usize,
    make: impl Fn(&mut ChaCha8Rng) -> String,
) -> Vec<String> {
    let mut all = std::collections::HashSet::new();
    let mut list = Vec::with_capacity(n);
    // A short list of words runs out; then the last ones get a number.
    for attempt in 0.. {
        if list.len() == n {
            break;
        }
        let mut s = make(rng);
        if attempt > 4 * n {
            s = format!("{s}-{attempt}");
        }
        if all.insert(s.clone()) {
            list.push(s);
        }
    }
    list
}

/// Nouns and adjectives as single words.
pub fn plain() -> impl Iterator<Item = &'static str> {
    NOUNS.iter().chain(ADJECTIVES).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn uuids_have_their_version_and_variant() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..50 {
            let id = uuid(&mut rng);
            assert_eq!(id.len(), 36);
            assert_eq!(id.as_bytes()[14], b'4', "{id}");
            assert!(b"89ab".contains(&id.as_bytes()[19]), "{id}");
        }
    }

    #[test]
    fn different_words_never_run_out() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let all = different(&mut rng, 9000, word);
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), 9000);
        assert!(ADJECTIVES.iter().chain(NOUNS).all(|w| w.is_ascii()));
    }
}

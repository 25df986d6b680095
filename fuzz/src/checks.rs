//! What must hold for any bytes: the bodies of the fuzz targets, which `tests/fuzz_corpus.rs`
//! replays on the stable toolchain.

use std::path::Path;

use barber_metric::Dims;
use llm_barber::{
    checkpoint::parse_header,
    mask::{Comparison, Mask, Pattern, Scope, Scored, rebuild as rebuild_masks},
    recipe::load_text,
};

/// A recipe's text is resolved or refused; a resolved recipe, written down, is the same recipe.
pub(crate) fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match load_text(Path::new("r.toml"), text, [], &[]) {
        Ok(loaded) => {
            let written = loaded.recipe.to_toml().unwrap();
            let again = load_text(Path::new("r.toml"), &written, [], &[]).unwrap();
            assert_eq!(again.recipe, loaded.recipe);
        }
        Err(error) => {
            assert!(!error.problems().is_empty());
            for problem in error.problems() {
                assert!(!problem.to_string().is_empty());
                assert!(problem.span().is_none_or(|span| span.end <= text.len()));
            }
        }
    }
}

/// A shard's header is refused, or every tensor that it promises lies within the file.
pub(crate) fn shard(data: &[u8]) {
    let Ok((start, header)) = parse_header(data) else { return };
    for (_, info) in header.tensors() {
        let (from, to) = info.data_offsets;
        assert!(from <= to && start + to <= data.len());
        assert!(to - from <= data.len());
    }
}

/// The rebuild keeps its counts and its pattern under any scores, or refuses them unchanged.
pub(crate) fn rebuild(data: &[u8]) {
    let [shape, scope, pattern, alpha, rest @ ..] = data else { return };
    let patterns = ["unstructured", "2:4", "1:2", "3:4", "4:8"];
    let pattern: Pattern = patterns[usize::from(*pattern) % patterns.len()].parse().unwrap();
    let scope = Scope::ALL[usize::from(*scope) % Scope::ALL.len()];
    let dims =
        Dims { rows: 1 + usize::from(shape >> 4), columns: 8 * (1 + usize::from(shape & 3)) };
    let numbers: Vec<f32> =
        rest.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if numbers.is_empty() {
        return;
    }
    let score = |i: usize| numbers[i % numbers.len()];
    let first: Vec<f32> = (0..dims.len()).map(score).collect();
    let second: Vec<f32> = (0..dims.len()).map(|i| score(i + dims.len())).collect();
    // A mask that follows the pattern, and one that differs from it in unstructured cases.
    let (kept, size) = match pattern {
        Pattern::Unstructured => (1 + usize::from(*alpha) % 7, 8),
        Pattern::NofM { n, m } => (n, m),
    };
    let before = [
        Mask::from_fn(dims, |i| i % size < kept),
        Mask::from_fn(dims, |i| (i + i / size) % size < kept),
    ];
    let mut after = before.clone();
    let [a, b] = &mut after;
    let mut group = [
        Scored { name: "first", scores: &first, mask: a },
        Scored { name: "second", scores: &second, mask: b },
    ];
    let alpha = f64::from(*alpha) / 255.0;
    let comparison = if rest.len() % 2 == 0 { Comparison::Pools } else { Comparison::Tiles };
    let result = rebuild_masks(&mut group, scope, pattern, alpha, comparison);
    if numbers.iter().any(|number| number.is_nan()) && result.is_err() {
        assert_eq!(before, after);
        return;
    }
    let swaps: usize = result.unwrap().iter().sum();
    let kept = |masks: &[Mask; 2]| masks.iter().map(Mask::kept).sum::<usize>();
    assert_eq!(kept(&before), kept(&after));
    assert!(swaps <= kept(&before));
    for (before, after) in before.iter().zip(&after) {
        pattern.check("after", after).unwrap();
        if scope != Scope::Group || pattern != Pattern::Unstructured {
            assert_eq!(before.kept(), after.kept());
        }
    }
}

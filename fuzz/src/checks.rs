//! What must hold for any bytes: the bodies of the fuzz targets, which `tests/fuzz_corpus.rs`
//! replays on the stable toolchain.

use std::path::{Path, PathBuf};

use barber_metric::{Dims, LayerStats};
use llm_barber::{
    calibration::{Samples, Selection, Text, Tokens, samples},
    checkpoint::{parse_header, parse_index},
    evaluate::TASKS,
    family::decoder,
    mask::{
        Comparison, Mask, OutputError, Pattern, Scope, Scored, rebuild as rebuild_masks,
        swap as swap_masks,
    },
    recipe::load_text,
    report::{self, Run, comparison_page, page},
    run::verify,
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
                let of_preset =
                    problem.origin.as_ref().is_some_and(|origin| origin.starts_with("preset"));
                assert!(of_preset || problem.excerpt().is_none_or(|piece| text.contains(piece)));
            }
        }
    }
}

/// A shard's header is refused, or every tensor that it promises lies within the file; an index of
/// shards is refused, or names files of its own directory.
pub(crate) fn shard(data: &[u8]) {
    if let Ok(index) = parse_index(data) {
        for (file, tensors) in index {
            assert!(!tensors.is_empty());
            assert_eq!(Path::new("dir").join(&file).parent(), Some(Path::new("dir")));
            assert_eq!(Path::new(&file).file_name(), Some(file.as_ref()));
        }
    }
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
    let (pattern, size, kept) = tiles(*pattern, *alpha);
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
        let pooled = matches!(scope, Scope::Group | Scope::Model);
        if !pooled || pattern != Pattern::UNSTRUCTURED {
            assert_eq!(before.kept(), after.kept());
        }
    }
}

/// A configuration is refused, or all that is computed from it is in range.
pub(crate) fn config(data: &[u8]) {
    let Ok(config) = serde_json::from_slice(data) else { return };
    let decoder = match decoder(&config) {
        Ok(decoder) => decoder,
        Err(error) => return assert!(error.to_string().starts_with("config.json: ")),
    };
    for (name, shape) in decoder.tensors() {
        let numbers = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        assert!(numbers.is_some_and(|numbers| numbers > 0), "{name}: {shape:?}");
    }
    for linear in decoder.projections() {
        assert!(linear.dims.len().checked_mul(size_of::<f32>()).is_some());
    }
    for rope in &decoder.ropes {
        let (cos, sin) = rope.tables(3);
        assert_eq!(cos.len(), 3 * rope.planes());
        assert!(cos.iter().chain(&sin).all(|x| x.is_finite()));
    }
}

/// A file that is read from the disk, in a directory of this thread alone.
fn file(name: &str, contents: &[u8]) -> PathBuf {
    thread_local! {
        static DIR: tempfile::TempDir = tempfile::tempdir().unwrap();
    }
    let path = DIR.with(|dir| dir.path().join(name));
    std::fs::write(&path, contents).unwrap();
    path
}

/// A text is read or refused, and its records are.
pub(crate) fn records(data: &[u8]) {
    let [kind, contents @ ..] = data else { return };
    let names = ["a.txt", "a.jsonl", "a.json", "a.parquet"];
    let path = file(names[usize::from(*kind) % names.len()], contents);
    let text = Text { documents: Some(1 + usize::from(kind >> 4)), ..Text::from(&*path) };
    if let Err(error) = text.read() {
        assert!(error.to_string().contains("a."), "{error}");
    }
    let wanted = Samples {
        count: 2,
        held_out: 0,
        sequence_length: 3,
        seed: 0,
        selection: Selection::Sequential,
    };
    let tokens = Tokens::of(Path::new("nowhere"), 10, false);
    if let Ok(rows) = samples(&text, wanted, &tokens) {
        assert!(rows.iter().all(|row| !row.is_empty() && row.iter().all(|id| *id < 10)));
    }
}

/// A question is read or refused; one that is read can be asked.
pub(crate) fn task(data: &[u8]) {
    let [kind, contents @ ..] = data else { return };
    let task = &TASKS[usize::from(*kind) % TASKS.len()];
    let path = file(if kind & 0x80 == 0 { "t.jsonl" } else { "t.parquet" }, contents);
    match task.questions(&path, Some(100)) {
        Ok(questions) => {
            for question in questions {
                assert!(question.gold < question.requests.len());
                let lengths = question.lengths.as_ref().map_or(question.requests.len(), Vec::len);
                assert_eq!(question.requests.len(), lengths);
            }
        }
        Err(error) => assert!(error.to_string().contains("t."), "{error}"),
    }
}

/// A report is refused, or pages can be made of it, and the result beside it be verified.
pub(crate) fn report(data: &[u8]) {
    // A checkpoint of one weight.
    let header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let shard = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat();
    file("model.safetensors", &shard);
    file("config.json", b"{}");
    file("barber-recipe.toml", b"model.path = 'nowhere'");
    let path = file(report::JSON, data);
    let dir = path.parent().unwrap();
    let verified = verify(dir, None, &());
    let Ok(read) = report::read(&path) else { return assert!(verified.is_err()) };
    let html = page(&read).unwrap();
    assert!(html.len() <= (1 << 16) + 1000 * data.len(), "{} of {}", html.len(), data.len());
    let other = ("other".to_owned(), read.clone());
    let runs = Run::named(vec![("run".to_owned(), read), other]);
    assert_eq!(report::Comparison::of(&runs).runs.len(), 2);
    comparison_page(&runs).unwrap();
    if let Ok(verified) = verified {
        assert!(!verified.findings.is_empty());
    }
}

/// A tokenizer is refused, or makes few tokens of a text.
pub(crate) fn tokenizer(data: &[u8]) {
    const TEXT: &str = "eeee the tree sees  é — \u{fdfa}\n<s>The 1234 trees";
    let path = file("tokenizer.json", data);
    let tokens = Tokens::of(path.parent().unwrap(), usize::MAX, true);
    if let Ok(ids) = tokens.encode(TEXT) {
        assert!(ids.len() <= 8 * TEXT.len() + 64 + 64 * 256, "{}", ids.len());
        let _ = tokens.decode(&ids);
    }
}

/// Swaps end, and keep counts and pattern under any numbers, or refuse them with the mask unchanged.
pub(crate) fn swap(data: &[u8]) {
    let [shape, scope, pattern, limit, rest @ ..] = data else { return };
    let numbers: Vec<f32> =
        rest.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if numbers.is_empty() {
        return;
    }
    let (pattern, size, kept) = tiles(*pattern, *limit);
    let dims =
        Dims { rows: 1 + usize::from(shape >> 5), columns: 8 * (1 + usize::from(shape & 3)) };
    let mut numbers = numbers.into_iter().cycle();
    let weight: Vec<f32> = numbers.by_ref().take(dims.len()).collect();
    let mut gram: Vec<f32> = numbers.by_ref().take(dims.columns * dims.columns).collect();
    // Symmetric, as a Gram matrix is.
    for i in 0..dims.columns {
        for j in 0..i {
            gram[i * dims.columns + j] = gram[j * dims.columns + i];
        }
    }
    let shift: Option<Vec<f32>> = (shape & 4 != 0).then(|| numbers.take(dims.len()).collect());
    let before = Mask::from_fn(dims, |i| (i + i / size) % size < kept);
    let mut after = before.clone();
    let scope = Scope::ALL[usize::from(*scope) % Scope::ALL.len()];
    let shrinkage = f32::from(limit >> 4) / 15.0;
    let error = OutputError { gram: &gram, shift: shift.as_deref(), shrinkage };
    let stats = LayerStats { name: "w", dims, weight: &weight, ..LayerStats::default() };
    let limit = usize::from(limit & 15);
    let Ok(swapped) = swap_masks(&stats, &mut after, error, scope, pattern, limit) else {
        assert_eq!(before, after);
        return;
    };
    assert!(swapped.swaps <= 3 * limit * dims.rows);
    assert_eq!(before.kept(), after.kept());
    pattern.check("w", &after).unwrap();
    for row in 0..dims.rows {
        let kept = |mask: &Mask| {
            (row * dims.columns..(row + 1) * dims.columns).filter(|i| mask.get(*i)).count()
        };
        assert!(scope == Scope::Layer || kept(&before) == kept(&after));
    }
}

/// A pattern, the size of its tiles and how many weights each keeps.
fn tiles(pattern: u8, seed: u8) -> (Pattern, usize, usize) {
    let patterns = [None, Some((2, 4)), Some((1, 2)), Some((3, 4)), Some((4, 8))];
    match patterns[usize::from(pattern) % patterns.len()] {
        None => (Pattern::UNSTRUCTURED, 8, 1 + usize::from(seed) % 7),
        Some((n, m)) => (Pattern::n_of_m(n, m), m, n),
    }
}

//! Sweeps: `[sweep]` lists values for keys, and the recipe is run for every combination.

use figment::value::{Dict, Value};

use super::{
    diagnose::{shown, unknown},
    error::{Fault, Problem},
    keys::is_key,
    layers::{Layer, Merged, merge},
    schema::SWEEP,
};

/// Maximum number of runs.
const MOST: usize = 1000;
/// Maximum number of characters of a value in the name of a directory.
const LONGEST: usize = 40;

/// The settings that distinguish one run of a sweep; without a sweep there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Name of the run's directory under `output.path`, such as `ratio=0.5,init=wanda`.
    pub name: String,
    /// The swept keys and their values, in the order of the file: strings without quotes, other
    /// values in TOML.
    pub settings: Vec<(String, String)>,
}

/// A swept key and its values.
struct Axis {
    /// The key's path in the recipe.
    path: Vec<String>,
    /// Each value as it appears in messages and in the names of directories.
    values: Vec<(String, String)>,
    /// The layer of each value.
    layers: Vec<Layer>,
    /// Index of the first layer that has the key, and its place in the text; orders the axes.
    order: (usize, usize),
}

/// The points of the sweep in the layers, each with the layers of its values; without a sweep, one
/// point without settings.
pub(super) fn points(given: &[Layer]) -> Result<Vec<(Point, Vec<Layer>)>, Vec<Problem>> {
    let (merged, values, _) = merge(given.to_vec());
    let mut found = Found { given, merged: &merged, axes: Vec::new(), problems: Vec::new() };
    if let Some(sweep) = values.get(SWEEP) {
        found.look(sweep, &mut vec![SWEEP.to_owned()]);
    }
    let Found { mut axes, mut problems, .. } = found;
    let runs = axes.iter().try_fold(1_usize, |runs, axis| runs.checked_mul(axis.values.len()));
    if runs.is_none_or(|runs| runs > MOST) {
        let why = format!("makes more than {MOST} runs");
        problems.push(Problem::at(SWEEP, Fault::Value(why)).help("sweep fewer values"));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    axes.sort_by_key(|axis| axis.order);
    let names = names(&axes);
    let mut points = vec![(Point::default(), Vec::new())];
    for (axis, name) in axes.iter().zip(names) {
        let mut longer = Vec::new();
        for (point, layers) in &points {
            for ((value, label), layer) in axis.values.iter().zip(&axis.layers) {
                let Point { name: before, mut settings } = point.clone();
                let comma = if before.is_empty() { "" } else { "," };
                settings.push((axis.path.join("."), value.clone()));
                let point = Point { name: format!("{before}{comma}{name}={label}"), settings };
                longer.push((point, [&layers[..], std::slice::from_ref(layer)].concat()));
            }
        }
        points = longer;
    }
    Ok(points)
}

/// The swept keys as they appear in the names of directories: the last segments, where these
/// differ.
fn names(axes: &[Axis]) -> Vec<String> {
    let last = |axis: &Axis| axis.path.last().cloned().unwrap_or_default();
    let alone = |axis: &Axis| axes.iter().filter(|other| last(other) == last(axis)).count() == 1;
    let name = |axis: &Axis| if alone(axis) { last(axis) } else { axis.path.join(".") };
    axes.iter().map(name).collect()
}

/// The axes and problems of a sweep found so far.
struct Found<'a> {
    given: &'a [Layer],
    merged: &'a Merged,
    axes: Vec<Axis>,
    problems: Vec<Problem>,
}

impl Found<'_> {
    /// Looks for lists at and below `path`, whose first segment is `sweep`.
    fn look(&mut self, value: &Value, path: &mut Vec<String>) {
        match value {
            Value::Dict(_, table) => self.table(table, path),
            Value::Array(_, values) if path.len() > 1 => self.axis(value, values, path),
            other => {
                let expected = match path.len() {
                    1 => "a table of lists of values",
                    _ => "a list of values, such as `[0.5, 0.6]`",
                };
                let found = shown(&other.to_actual());
                let fault = Fault::Type { found, expected: expected.into() };
                self.wrong(other, Problem::new(path.clone(), fault));
            }
        }
    }

    fn table(&mut self, table: &Dict, path: &mut Vec<String>) {
        for (name, value) in table {
            path.push(name.clone());
            if is_key(&path[1..]) {
                self.look(value, path);
            } else {
                let mut problem = unknown(path[1..].to_vec());
                problem.path = path.clone();
                self.wrong(value, problem);
            }
            path.pop();
        }
    }

    fn axis(&mut self, list: &Value, values: &[Value], path: &[String]) {
        let key = &path[1..];
        let why = if values.is_empty() {
            Some(("is empty".to_owned(), "give it values, such as `[0.5, 0.6]`"))
        } else if key.first().is_some_and(|section| section == "output")
            && key.ends_with(&["path".into()])
        {
            Some(("cannot be swept".into(), "each run has a directory of its own in `output.path`"))
        } else {
            self.given.iter().find(|layer| layer.assigns(key)).map(|layer| {
                let (key, by) = (key.join("."), layer.origin(key));
                let help = "narrow the sweep, as with `--set 'sweep.sparsity.ratio=[0.5]'`";
                (format!("`{key}` is swept, but {by} sets it, too"), help)
            })
        };
        if let Some((why, help)) = why {
            return self.wrong(list, Problem::new(path.to_vec(), Fault::Value(why)).help(help));
        }
        let Some(layer) = self.merged.layer_of(list) else { return };
        let texts: Vec<String> = values.iter().map(text).collect();
        for (i, value) in values.iter().enumerate() {
            if texts[..i].contains(&texts[i]) {
                let path = [path, &[i.to_string()]].concat();
                let why = format!("{} is listed twice", texts[i]);
                let problem = Problem::new(path, Fault::Value(why)).help("list each value once");
                self.wrong(value, problem);
            }
        }
        let layers = (0..values.len()).filter_map(|i| {
            let from = [path, &[i.to_string()]].concat();
            layer.choice(&from, key)
        });
        let layers = layers.collect();
        let values = texts.into_iter().zip(labels(values)).collect();
        // A list that a later layer replaces keeps its place.
        let first = self.given.iter().position(|layer| layer.value(path).is_some());
        let order = first.map_or((0, 0), |first| (first, self.given[first].start(path)));
        self.axes.push(Axis { path: key.to_vec(), values, layers, order });
    }

    fn wrong(&mut self, value: &Value, mut problem: Problem) {
        if let Some(layer) = self.merged.layer_of(value) {
            let path = problem.path.clone();
            layer.blame(&mut problem, &path);
        }
        self.problems.push(problem);
    }
}

/// A value as it appears in messages.
fn text(value: &Value) -> String {
    match toml::Value::try_from(value) {
        Ok(toml::Value::String(text)) => text,
        Ok(value) => value.to_string(),
        Err(error) => error.to_string(),
    }
}

/// The values of a key as they appear in the names of directories: the index in the list for a
/// value that is not a word, or whose name is not unique.
fn labels(values: &[Value]) -> Vec<String> {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '-' };
    let word = |value: &Value| match value {
        Value::Array(..) | Value::Dict(..) => String::new(),
        scalar => text(scalar).chars().take(LONGEST).map(allowed).collect(),
    };
    let words: Vec<String> = values.iter().map(word).collect();
    let alone = |word: &str| words.iter().filter(|other| other.eq_ignore_ascii_case(word)).count();
    let label = |(i, word): (usize, &String)| match (word.is_empty(), alone(word)) {
        (true, _) => format!("{}", i + 1),
        (_, 1) => word.clone(),
        _ => format!("{word}-{}", i + 1),
    };
    words.iter().enumerate().map(label).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        prune::{Refine, Swap},
        recipe::{Loaded, RecipeError, resolve::runs},
    };

    const FINE: &str = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";

    fn load(text: &str, sets: &[&str]) -> Result<Vec<Loaded>, RecipeError> {
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        runs(Path::new("r.toml"), &format!("{FINE}{text}"), [], &sets)
    }

    #[test]
    fn a_grid_has_every_combination() {
        let text = "sparsity.ratio = 0.9\n[[refine]]\nuse = 'rebuild'\n[sweep]\nsparsity.ratio = [0.5, 0.6]\n\
                    refine.0.alpha = [0.1, 'auto', 1]\nmask.init = ['wanda']\n";
        let runs = load(text, &[]).unwrap();
        let names: Vec<&str> = runs.iter().map(|run| run.point.name.as_str()).collect();
        // In the order of the file, the first key varying slowest.
        assert_eq!(
            names,
            [
                "ratio=0.5,alpha=0.1,init=wanda",
                "ratio=0.5,alpha=auto,init=wanda",
                "ratio=0.5,alpha=1,init=wanda",
                "ratio=0.6,alpha=0.1,init=wanda",
                "ratio=0.6,alpha=auto,init=wanda",
                "ratio=0.6,alpha=1,init=wanda",
            ]
        );
        let run = &runs[3];
        let setting = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            run.point.settings,
            [
                setting("sparsity.ratio", "0.6"),
                setting("refine.0.alpha", "0.1"),
                setting("mask.init", "wanda"),
            ]
        );
        assert_eq!(run.recipe.sparsity.ratio, 0.6);
        assert_eq!(
            run.recipe.output.path.as_deref(),
            Some(Path::new("o").join(names[3]).as_path())
        );
        assert_eq!(run.origin("sparsity.ratio"), "r.toml line 8");
        assert_eq!(run.origin("output.path"), "r.toml line 3");
        assert!(!run.recipe.to_toml().unwrap().contains("sweep"));
    }

    #[test]
    fn any_value_can_be_swept() {
        let text = "[sweep]\npreset = ['best', 'fast']\nsparsity.exclude = [['a'], ['b']]\n\
                    calibration.source = ['x/y.txt', 'x-y.txt']\n";
        let runs = load(text, &[]).unwrap();
        assert_eq!(runs.len(), 8);
        let run = &runs[6];
        assert_eq!(run.point.name, "preset=fast,exclude=2,source=x-y.txt-1");
        assert_eq!(run.recipe.refine, [Refine::Swap(Swap { limit: 25, ..Swap::default() })]);
        assert_eq!(run.recipe.sparsity.exclude, ["b"]);
        assert_eq!(run.recipe.calibration.source.as_deref(), Some(Path::new("x/y.txt")));
        // A sweep can be given, and narrowed, on the command line.
        let runs =
            load(text, &["sweep.preset=['paper']", "sweep.calibration.seed=[1, 2]"]).unwrap();
        assert_eq!(runs.len(), 8);
        assert_eq!(runs[0].point.name, "preset=paper,exclude=1,source=x-y.txt-1,seed=1");
        // Without one there is one run, which is of no sweep.
        let [run] = &load("[sweep]\n", &[]).unwrap()[..] else { panic!("one run") };
        assert_eq!(run.point, Point::default());
        assert_eq!(run.recipe.output.path.as_deref(), Some(Path::new("o")));
    }

    #[test]
    fn what_is_wrong_with_a_sweep_is_said() {
        let many = format!("[sweep]\ncalibration.seed = {:?}", (0..1001).collect::<Vec<_>>());
        for (text, sets, key, excerpt, message) in [
            ("sweep = [1]", &[][..], "sweep", "[1]", "a table of lists"),
            ("sweep.sparsity.ratio = 0.5", &[], "sweep.sparsity.ratio", "0.5", "a list of values"),
            ("sweep.sparsity.ratio = []", &[], "sweep.sparsity.ratio", "[]", "is empty"),
            ("sweep.sparsity.ratio = [1, 1]", &[], "sweep.sparsity.ratio.1", "1", "listed twice"),
            ("sweep.sparsity.ratoi = [0.5]", &[], "sweep.sparsity.ratoi", "ratoi", "unknown key"),
            ("sweep.output.path = ['a']", &[], "sweep.output.path", "['a']", "cannot be swept"),
            ("sweep.sparsity.ratio = [0.5, 2]", &[], "sparsity.ratio", "2", "below 1, got 2"),
            ("sweep.mask.init = ['wanda', 'wand']", &[], "mask.init", "'wand'", "cannot be `wand`"),
            (
                "sweep.sparsity.ratio = [0.5, 0.6]",
                &["sparsity.ratio=0.5"],
                "sweep.sparsity.ratio",
                "[0.5, 0.6]",
                "--set sparsity.ratio=0.5 sets it, too",
            ),
            (&many, &[], "sweep", "", "more than 1000 runs"),
        ] {
            let error = load(text, sets).expect_err(text);
            let [problem] = error.problems() else { panic!("{text}: {error:?}") };
            assert_eq!(problem.key(), key, "{text}");
            assert!(problem.to_string().contains(message), "{text}: {problem}");
            assert_eq!(problem.excerpt().unwrap_or_default(), excerpt, "{text}");
        }
        // What is wrong with every run is said once, with what is wrong with some.
        let text = "mask.passes = 3\nsweep.sparsity.ratio = [0.5, 0.6, 1, 2]";
        let error = load(text, &[]).unwrap_err();
        let shown: Vec<String> = error.problems().iter().map(ToString::to_string).collect();
        assert_eq!(shown.len(), 3, "{shown:?}");
        // What needs one run says that these are more.
        let text = format!("{FINE}sweep.sparsity.ratio = [0.5, 0.6]");
        let error = super::super::load_text(Path::new("r.toml"), &text, [], &[]).unwrap_err();
        assert!(error.to_string().contains("makes 2 runs"), "{error}");
    }
}

//! The pages: of a run, and of several. What a page is made of is checked on its HTML; where there is
//! a Chromium, the page is loaded in it too.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use llm_barber::{
    checkpoint::Format,
    evaluate::{Accuracy, Perplexity},
    executor::Loss,
    mask::{Distribution, Histogram},
    prune::{GroupReport, MatrixReport, StageReport},
    recipe::Setting,
    report::{
        GenerationReport, Matrix, OutputError, Report, Run, Size, Sizes, Stages, TaskReport,
        TextReport, comparison_page, page, read,
    },
};
use scraper::{ElementRef, Html, Selector};
use serde_json::Value;
use util::{barber, flat, recipe};

/// The report of a run on a model with so many layers; `name` is in all that comes from outside.
fn report(layers: usize, name: &str) -> Report {
    let matrix = |layer: usize, part: &str, of: &str| Matrix {
        tensor: format!("model.layers.{layer}.{name}{part}.{of}.weight"),
        layer,
        group: format!("{part}{name}"),
        shape: [64, 64],
        pattern: "unstructured".into(),
        initial: 2048,
        kept: 2048 + layer,
    };
    let mut report = Report {
        version: llm_barber::version::Version::current(),
        model: format!("models/{name}").into(),
        output: format!("out/{name}").into(),
        model_weights: layers * 10 * 4096,
        prunable_weights: layers * 7 * 4096,
        pruned_weights: layers * 7 * 2048,
        perplexity: vec![TextReport {
            text: format!("data/{name}.txt"),
            found: Stages {
                dense: perplexity(24.94),
                initial: Some(perplexity(47.0)),
                refined: Some(perplexity(35.9)),
            },
        }],
        tasks: vec![TaskReport {
            task: "arc_easy".into(),
            found: Stages {
                dense: accuracy(0.6125),
                initial: Some(accuracy(0.5)),
                refined: Some(accuracy(0.55)),
            },
        }],
        seconds: [("refinement".into(), 68.0), ("evaluation".into(), 3.5)].into(),
        memory: [("refinement".into(), 467_000_000), ("evaluation".into(), 100_000_000)].into(),
        sizes: Sizes {
            format: Format::named("sparse-bitmask").unwrap(),
            dense: Size { weight_bytes: 269_000_000, directory_bytes: 271_000_000 },
            output: Size { weight_bytes: 151_000_000, directory_bytes: 153_000_000 },
            pruned_matrices: 7 * layers,
            compressed_matrices: 7 * layers,
        },
        operations: 2_500_000_000_000,
        product_seconds: 50.0,
        least_operations: 2e12,
        recipe: vec![
            Setting {
                key: "model.path".into(),
                value: format!("\"models/{name}\""),
                source: "my.toml line 2".into(),
            },
            Setting { key: "mask.passes".into(), value: "2".into(), source: "default".into() },
        ],
        inputs: [(PathBuf::from(format!("models/{name}/model.safetensors")), "ab".repeat(32))]
            .into(),
        ..Report::default()
    };
    for layer in 0..layers {
        for (part, linears) in [
            ("self-attention", &["q_proj", "k_proj", "v_proj", "o_proj"][..]),
            ("mlp", &["gate_proj", "up_proj", "down_proj"]),
        ] {
            let matrices: Vec<_> = linears.iter().map(|of| matrix(layer, part, of)).collect();
            let swaps = matrices.iter().enumerate().map(|(i, of)| MatrixReport {
                tensor: of.tensor.clone(),
                came_back: 10 * i + layer,
                kept_before: of.initial,
                kept: of.kept,
                weights: of.weights(),
            });
            let loss = |factor: f64| Loss {
                calibration: factor * 1e-4 * 1.2_f64.powi(layer as i32 % 40),
                held_out: Some(factor * 1.1e-4),
            };
            let scores = |first: i32| Histogram {
                zero: 1,
                first,
                counts: (0..24).map(|bin| 10 * (12 - (12_i64 - bin).abs()) as u64).collect(),
            };
            report.groups.push(GroupReport {
                layer,
                group: matrices[0].group.clone(),
                stages: vec![StageReport {
                    stage: "rebuild".into(),
                    before: loss(1.0),
                    after: loss(0.6),
                    accepted: true,
                    matrices: swaps.collect(),
                    scores: Some(Distribution {
                        measure: format!("weight-gradient{name}"),
                        kept: scores(-30),
                        came_back: scores(-34),
                        went: scores(-40),
                        pruned: scores(-44),
                    }),
                }],
            });
            report.matrices.extend(matrices);
        }
    }
    report.output_error = OutputError::of(&report.groups);
    report
}

fn perplexity(perplexity: f64) -> Perplexity {
    let (cross_entropy, predictions, segments) = (perplexity.ln(), 8128, 64);
    Perplexity { perplexity, cross_entropy, predictions, segments, ..Perplexity::default() }
}

fn accuracy(acc: f64) -> Accuracy {
    let (acc_norm, acc_norm_stderr) = (Some(acc + 0.02), Some(0.01));
    Accuracy { acc, acc_stderr: 0.01, acc_norm, acc_norm_stderr, questions: 2376 }
}

fn all<'a>(html: &'a Html, selector: &str) -> Vec<ElementRef<'a>> {
    html.select(&Selector::parse(selector).unwrap()).collect()
}

fn text(element: ElementRef<'_>) -> String {
    element.text().collect::<Vec<_>>().concat()
}

/// What every page has to be.
fn check(page: &str) -> Html {
    let html = Html::parse_document(page);
    assert!(html.errors.is_empty(), "{:?}", html.errors);
    // It loads nothing and runs nothing.
    for selector in ["script", "link", "img", "iframe", "object", "base", "[src]", "[onload]"] {
        assert_eq!(all(&html, selector).len(), 0, "{selector}");
    }
    for loading in ["url(", "@import", "http:", "https:"] {
        let style = all(&html, "style").into_iter().map(text).collect::<String>();
        assert!(!style.contains(loading), "{loading}");
    }
    for link in all(&html, "a") {
        let target = link.attr("href").unwrap();
        assert_eq!(all(&html, target).len(), 1, "{target}");
    }
    // A reader who does not see it finds the way, and what the charts show.
    assert_eq!(all(&html, "html[lang]").len(), 1);
    assert_eq!(all(&html, "h1").len(), 1);
    assert_eq!(all(&html, "main").len(), 1);
    assert_eq!(all(&html, "nav[aria-label]").len(), 1);
    for section in all(&html, "section") {
        let title = format!("#{}", section.attr("aria-labelledby").unwrap());
        assert_eq!(all(&html, &title).len(), 1, "{title}");
    }
    for chart in all(&html, "svg") {
        if chart.attr("aria-hidden") == Some("true") {
            continue;
        }
        assert_eq!(chart.attr("role"), Some("img"));
        assert!(!chart.attr("aria-label").unwrap().is_empty());
        assert!(chart.select(&Selector::parse("title").unwrap()).next().is_some());
        assert!(chart.attr("viewbox").or(chart.attr("viewBox")).is_some());
    }
    let mut regions: Vec<_> = all(&html, ".scroll")
        .into_iter()
        .map(|region| {
            assert_eq!(region.attr("tabindex"), Some("0"));
            region.attr("aria-label").unwrap().to_owned()
        })
        .collect();
    let count = regions.len();
    regions.sort();
    regions.dedup();
    assert!(regions.len() == count && !regions.contains(&String::new()), "{regions:?}");
    for table in all(&html, "table") {
        let of = |selector: &str| table.select(&Selector::parse(selector).unwrap()).count();
        assert_eq!(of("caption"), 1);
        assert!(of("thead th[scope=col]") > 1);
        assert_eq!(of("tbody tr"), of("tbody th[scope=row]"));
    }
    html
}

/// Loads a page in the machine's Chromium and returns the text that it shows.
fn loaded(page: &Path) -> String {
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let found = |name: &&str| Command::new(name).arg("--version").output().is_ok();
    let chromium = names.into_iter().find(found).expect("Chromium is needed");
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}", page.canonicalize().unwrap().display()))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    // What a page does wrong goes to its console.
    assert!(!log.contains("CONSOLE"), "{log}");
    let html = Html::parse_document(&String::from_utf8(output.stdout).unwrap());
    text(all(&html, "body")[0])
}

#[test]
fn a_run_writes_a_page_of_its_report() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let run = barber(&["prune", &recipe]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let out = dir.path().join("out");
    let report = read(&out).unwrap();
    let path = out.join("barber-report.html");
    let html = fs::read_to_string(&path).unwrap();
    // The JSON is all that it is made of.
    assert_eq!(html, page(&report).unwrap());
    let recipe = text(all(&check(&html), "#recipe")[0]);
    for expected in report.outputs.values().chain([&report.version.target]) {
        assert!(recipe.contains(expected), "no {expected}");
    }
    assert!(report.outputs.contains_key("model.safetensors"));
    // The figures are those of the run.
    let json: Value =
        serde_json::from_str(&fs::read_to_string(out.join("barber-report.json")).unwrap()).unwrap();
    assert_eq!(serde_json::to_value(&report).unwrap(), json);
    let matrices = &report.matrices;
    let weights: usize = matrices.iter().map(Matrix::weights).sum();
    let kept: usize = matrices.iter().map(|matrix| matrix.kept).sum();
    assert_eq!((weights, weights - kept), (report.prunable_weights, report.pruned_weights));
    let mut swaps = 0;
    for group in &report.groups {
        let [stage] = &group.stages[..] else { panic!("{group:?}") };
        let scores = stage.scores.as_ref().unwrap();
        let came_back: usize = stage.matrices.iter().map(|matrix| matrix.came_back).sum();
        assert_eq!(scores.measure, "weight-gradient");
        assert_eq!(scores.came_back.len(), came_back as u64);
        assert_eq!(scores.went.len(), came_back as u64);
        let kept: usize = stage.matrices.iter().map(|matrix| matrix.kept).sum();
        assert_eq!(scores.kept.len() + scores.came_back.len(), kept as u64);
        // What came back scores higher than what went.
        assert!(scores.came_back.quantile(0.5) > scores.went.quantile(0.5));
        swaps += came_back;
    }
    assert!(swaps > 0);
    let size = |dir: &Path| {
        let bytes = util::tensors(dir).values().map(|(_, _, bytes)| bytes.len()).sum::<usize>();
        bytes as u64
    };
    assert_eq!(report.sizes.dense.weight_bytes, size(Path::new(util::TINY)));
    assert_eq!(report.sizes.output.weight_bytes, size(&out));
    let phases = ["evaluation", "initial masks", "refinement", "writing"];
    assert_eq!(report.seconds.keys().collect::<Vec<_>>(), phases);
    if cfg!(target_os = "linux") {
        assert_eq!(report.memory.keys().collect::<Vec<_>>(), phases);
        assert!(report.memory.values().all(|bytes| *bytes > 1 << 20));
    }
    let ratio = report.recipe.iter().find(|setting| setting.key == "refine.0.alpha").unwrap();
    assert_eq!(ratio.value, "0.2");
    assert!(ratio.source.ends_with("recipe.toml line 12"), "{}", ratio.source);
}

#[test]
fn groups_whose_stage_was_taken_back_are_marked() {
    let mut report = report(6, "");
    let legend = |page: &Html| text(all(page, "#error")[0]).contains("a stage was taken back");
    let plain = check(&page(&report).unwrap());
    assert!(!legend(&plain));
    // The circles of the charts: markers, and rings.
    let circles = |page: &Html| all(page, "#error svg.chart circle").len();
    for group in &mut report.groups {
        if (group.layer, &*group.group) == (4, "mlp") {
            let stage = &mut group.stages[0];
            (stage.accepted, stage.after) = (false, stage.before);
        }
    }
    report.output_error = OutputError::of(&report.groups);
    let marked = check(&page(&report).unwrap());
    assert!(legend(&marked));
    // In the chart of its group, and in the one of all.
    assert_eq!(circles(&marked), circles(&plain) + 2);
    let shown = text(all(&marked, "main")[0]);
    assert!(shown.contains("was taken back in layer 4's mlp"), "{shown}");
    let tile = text(all(&marked, ".tiles")[0]);
    assert!(tile.contains("in layer 4's mlp"), "{tile}");
}

#[test]
fn a_large_group_does_not_decide_about_the_headline() {
    let mut report = report(2, "");
    for (group, [before, after]) in
        report.groups.iter_mut().zip([[1e6, 1e5], [1.0, 1.2], [2.0, 2.2], [3.0, 3.3]])
    {
        let stage = &mut group.stages[0];
        (stage.before, stage.after) = (
            Loss { calibration: before, held_out: None },
            Loss { calibration: after, held_out: None },
        );
    }
    report.output_error = OutputError::of(&report.groups);
    let tile = text(all(&check(&page(&report).unwrap()), ".tiles")[0]);
    // (0.1 + 1.2 + 1.1 + 1.1) / 4, though the sum of the errors falls by 90%.
    assert!(tile.contains("−12.5%") && tile.contains("+20.0% in layer 0's mlp"), "{tile}");
}

#[test]
fn what_one_pass_does_not_measure_has_no_column() {
    let mut report = report(2, "");
    let quality = |report: &Report| text(all(&check(&page(report).unwrap()), "#quality")[0]);
    assert!(quality(&report).contains("initial mask") && !quality(&report).contains("one pass"));
    report.perplexity[0].found.initial = None;
    report.tasks[0].found.initial = None;
    let shown = quality(&report);
    assert!(
        !shown.contains("initial mask") || shown.matches("initial mask").count() == 1,
        "{shown}"
    );
    assert!(shown.contains("one pass") && !shown.contains('–'), "{shown}");
}

/// Asserts that no two labels of a chart are in each other's place, and that all are in the picture.
fn labels_are_apart(chart: ElementRef<'_>) {
    let number = |of: &ElementRef<'_>, name: &str| of.attr(name).unwrap().parse::<f64>().unwrap();
    let view = chart.attr("viewbox").or(chart.attr("viewBox")).unwrap();
    let width: f64 = view.split(' ').nth(2).unwrap().parse().unwrap();
    let labels: Vec<_> = chart
        .select(&Selector::parse("text").unwrap())
        .map(|label| {
            let (x, y, size) =
                (number(&label, "x"), number(&label, "y"), number(&label, "font-size"));
            // Letters are about half as wide as they are high.
            let wide = 0.5 * size * text(label).trim().chars().count() as f64;
            let left = match label.attr("text-anchor") {
                Some("end") => x - wide,
                Some("middle") => x - wide / 2.0,
                _ => x,
            };
            (text(label), left, left + wide, y, size)
        })
        .collect();
    for (i, (one, left, right, y, size)) in labels.iter().enumerate() {
        assert!(*left >= 0.0 && *right <= width, "{one} is at {left}..{right} of {width}");
        for (other, start, end, at, _) in &labels[..i] {
            let beside = right <= start || end <= left || (y - at).abs() >= 0.8 * size;
            assert!(beside, "{one} and {other} overlap");
        }
    }
}

/// The reports of a sweep of ratios and initial masks, with their paths.
fn sweep() -> Vec<(String, Report)> {
    let setting = |key: &str, value: &str| Setting {
        key: key.into(),
        value: value.into(),
        source: "sweep".into(),
    };
    let mut runs = Vec::new();
    for init in ["wanda", "magnitude"] {
        for ratio in [0.4, 0.5, 0.55, 0.6] {
            let mut report = report(2, "owner");
            report.recipe.push(setting("sparsity.ratio", &ratio.to_string()));
            report.recipe.push(setting("mask.init", &format!("{init:?}")));
            report.perplexity[0].found.refined = Some(perplexity(30.0 * (1.0 + ratio)));
            runs.push((format!("out/ratio={ratio},init={init}"), report));
        }
    }
    runs
}

#[test]
fn a_sweep_is_drawn_by_its_values() {
    let html = check(&comparison_page(&Run::named(sweep())).unwrap());
    let section = all(&html, "#perplexity")[0];
    let shown = text(section);
    for expected in ["sparsity.ratio", "init wanda", "init magnitude", "dense", "40%", "60%"] {
        assert!(shown.contains(expected), "no {expected} in {shown}");
    }
    let charts = all(&html, "svg.chart");
    charts.into_iter().for_each(labels_are_apart);
    // A line for each initial mask and one for the dense model; a marker for each run.
    assert_eq!(all(&html, "#perplexity svg.chart polyline[stroke-width=\"4\"]").len(), 3);
    let title = text(all(&html, "head title")[0]);
    assert_eq!(title, "models/owner: 8 runs, compared");
}

#[test]
fn runs_that_are_no_sweep_have_a_row_each() {
    // All are equally good: labels of points would be on each other.
    let runs: Vec<_> =
        (0..12).map(|i| (format!("out/{i}-a-rather-long-name"), report(2, ""))).collect();
    let html = check(&comparison_page(&Run::named(runs)).unwrap());
    let chart = all(&html, "#perplexity svg.chart")[0];
    labels_are_apart(chart);
    assert!(text(chart).contains("dense") && text(chart).contains("11-a-rather-long-name"));
    assert_eq!(chart.select(&Selector::parse("circle").unwrap()).count(), 13);
}

#[test]
fn swaps_of_many_layers_are_a_heatmap_with_a_scale() {
    let html = check(&page(&report(32, "")).unwrap());
    let chart = all(&html, "#swaps svg.chart")[0];
    labels_are_apart(chart);
    let cells: Vec<_> = chart.select(&Selector::parse("rect").unwrap()).collect();
    // Of the first matrix of each part nothing came back in layer 0.
    assert_eq!(cells.len(), 7 * 32 - 2);
    let mut colours: Vec<_> = cells.iter().map(|cell| cell.attr("fill").unwrap()).collect();
    colours.sort_unstable();
    colours.dedup();
    let keys: Vec<String> = all(&html, "#swaps .scale li").into_iter().map(text).collect();
    assert_eq!(colours.len(), keys.len());
    // Layer 31: 61 of 2079.
    assert_eq!(keys.last().unwrap().trim(), "to 2.93%");
    for cell in cells {
        let side = |name| cell.attr(name).unwrap().parse::<f64>().unwrap();
        assert!(side("width") > 40.0 && side("height") > 40.0);
    }
}

#[test]
fn what_models_say_is_side_by_side() {
    let mut report = report(2, "owner/name");
    assert_eq!(all(&check(&page(&report).unwrap()), "#examples").len(), 0);
    let said = |text: &str| format!("<b>{text}</b> & so on");
    report.generations = vec![GenerationReport {
        prompt: said("once"),
        found: Stages {
            dense: said("upon"),
            initial: Some(said("a")),
            refined: Some(said("time")),
        },
    }];
    let html = check(&page(&report).unwrap());
    let cells: Vec<_> = all(&html, "#examples .said").into_iter().map(text).collect();
    let expected = ["once", "upon", "a", "time"].map(said);
    assert_eq!(cells[0], format!("{} …", expected[0]));
    assert_eq!(cells[1..], expected[1..]);
    let back: Report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
    assert_eq!(back.generations, report.generations);
}

#[test]
fn prompts_are_continued_and_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, prompts: &str| {
        let out = dir.path().join(name);
        let path = format!("output.path={}", out.display());
        let mut arguments = vec!["prune", "recipes/quickstart.toml", "--set", &path];
        arguments.extend(["--set", "calibration.samples=4", "--set", "evaluate.segments=4"]);
        arguments.extend(["--set", prompts]);
        let run = barber(&arguments);
        (run, out)
    };
    let generations = |name: &str, prompts: &str| {
        let (run, out) = run(name, prompts);
        assert_eq!(run.status, 0, "{}", run.stderr);
        let shown = text(
            all(&check(&fs::read_to_string(out.join("barber-report.html")).unwrap()), "main")[0],
        );
        let found = read(&out).unwrap().generations;
        found.iter().for_each(|of| assert!(shown.contains(&of.prompt)));
        found
    };
    let prompts = r#"evaluate.generate=["The red letter is in the", "6 plus 1 is"]"#;
    let found = generations("one", prompts);
    assert_eq!(found, generations("two", prompts));
    assert_eq!(found[1].prompt, "6 plus 1 is");
    for of in &found {
        let all = of.found.named().map(|(_, said)| said).collect::<Vec<_>>();
        assert!(all.len() == 3 && all.iter().all(|said| said.trim().len() > 20), "{of:?}");
    }
    // The dense model is at home in its language.
    assert!(found[1].found.dense.trim().starts_with("7 ."), "{found:?}");
    // The beginnings of the text itself.
    let found = generations("three", "evaluate.generate=2");
    let [first, second] = &found[..] else { panic!("{found:?}") };
    assert!(first.prompt.starts_with("6 plus 1 is 7") && second.prompt != first.prompt);
    assert_eq!(generations("none", "evaluate.generate=0"), []);

    // What a model without a tokenizer cannot read is said at once.
    let recipe = recipe(dir.path(), "evaluate.generate = ['a']");
    let run = barber(&["prune", &recipe]);
    assert_eq!(run.status, 1);
    assert!(flat(&run.stderr).contains("tokenizer.json"), "{}", run.stderr);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn stages_say_which_weights_they_swapped() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let stages = r#"refine=[{ use = "swap" }, { use = "reconstruct" }]"#;
    let held_out = "calibration.held_out=1";
    let run = barber(&["prune", &recipe, "--set", stages, "--set", held_out]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let report = read(&dir.path().join("out")).unwrap();
    let mut swaps = 0;
    for group in &report.groups {
        let [swap, reconstruct] = &group.stages[..] else { panic!("{group:?}") };
        assert_eq!((&*swap.stage, &*reconstruct.stage), ("swap", "reconstruct"));
        assert!(swap.before.held_out.is_some() && reconstruct.scores.is_none());
        assert_eq!(swap.scores.is_some(), swap.accepted);
        let Some(scores) = &swap.scores else { continue };
        let came_back: usize = swap.matrices.iter().map(|matrix| matrix.came_back).sum();
        let kept: usize = swap.matrices.iter().map(|matrix| matrix.kept_before).sum();
        assert_eq!(scores.measure, "|w|·‖x‖");
        assert_eq!(scores.came_back.len(), came_back as u64);
        assert_eq!(scores.kept.len() + scores.went.len(), kept as u64);
        swaps += came_back;
    }
    assert!(swaps > 0);
    let html = check(&page(&report).unwrap());
    assert!(text(all(&html, "#error")[0]).contains("held out"));
    assert!(text(all(&html, "#scores")[0]).contains("1. swap, by |w|·‖x‖"));
}

/// What a report from outside may call a group, and would like to be.
const SCRIPT: &str =
    "<script>alert(1)</script>\"'&amp;</title></style><img src=x onerror=alert(1)>";

/// The page of a run, and that of two, whose groups have such a name.
fn hostile_pages() -> [String; 2] {
    let mut report = report(3, SCRIPT);
    // Two stages alike.
    for group in &mut report.groups {
        group.stages.push(group.stages[0].clone());
    }
    let one = page(&report).unwrap();
    let two = vec![(SCRIPT.to_owned(), report.clone()), (format!("{SCRIPT}2"), report)];
    [one, comparison_page(&Run::named(two)).unwrap()]
}

#[test]
fn what_is_from_outside_is_text() {
    for page in hostile_pages() {
        assert!(text(all(&check(&page), "body")[0]).contains(SCRIPT));
    }
}

#[test]
#[ignore = "needs Chromium"]
fn a_browser_shows_every_page_without_a_complaint() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let run = barber(&["prune", &recipe]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let out = dir.path().join("out");
    let shown = loaded(&out.join("barber-report.html"));
    for expected in ["50.00%", "Output error", "q_proj", "refine.0.alpha", "weight-gradient"] {
        assert!(shown.contains(expected), "no {expected}");
    }
    let html = dir.path().join("compared.html");
    let out = out.to_str().unwrap();
    let run = barber(&["compare", out, out, "--html", html.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(loaded(&html).contains("Output error"));
    for (i, page) in hostile_pages().iter().enumerate() {
        let path = dir.path().join(format!("{i}.html"));
        fs::write(&path, page).unwrap();
        assert!(loaded(&path).contains("<script>alert(1)</script>"));
    }
}

#[test]
fn pages_are_small_and_have_all_figures() {
    let report = report(32, "");
    let html = page(&report).unwrap();
    assert!(html.len() < 600_000, "{}", html.len());
    let parsed = check(&html);
    let shown = text(all(&parsed, "body")[0]);
    for expected in [
        "50.00%",
        "35.00% of the whole model",
        "24.94",
        "35.90",
        "1.44",
        "61.25% ± 1",
        "−40.0%",
        "467.0 MB",
        "269.0 MB",
        "1 min 8 s",
        "model.layers.31.mlp.down_proj.weight",
        "my.toml line 2",
        "default",
    ] {
        assert!(shown.contains(expected), "no {expected}");
    }
    // Three charts of errors, two of sparsity, one of swaps, two of medians, and each group's scores.
    assert_eq!(all(&parsed, "svg.chart").len(), 3 + 2 + 1 + 2 + 64);
    let deep = page(&self::report(120, "")).unwrap();
    assert!(deep.len() < 1_000_000, "{}", deep.len());
    let parsed = check(&deep);
    assert!(all(&parsed, "svg.chart").len() <= 3 + 2 + 1 + 2 + 80);
}

#[test]
fn what_is_missing_or_no_number_is_said() {
    let shown = |report: &Report| text(all(&check(&page(report).unwrap()), "body")[0]);
    let nothing = shown(&Report::default());
    for expected in ["no [[refine]]", "No weights changed places", "Nothing was measured"] {
        assert!(nothing.contains(expected), "no {expected}");
    }
    let mut odd = report(2, "");
    for (of, value) in odd.perplexity.iter_mut().zip([f64::NAN]) {
        of.found.dense.perplexity = f64::INFINITY;
        of.found.refined = Some(perplexity(value));
    }
    for group in &mut odd.groups {
        group.stages[0].after.calibration = f64::NAN;
        group.stages[0].before.calibration = 0.0;
        for matrix in &mut group.stages[0].matrices {
            (matrix.kept, matrix.came_back) = (0, 0);
        }
    }
    let scores = odd.groups[0].stages[0].scores.as_mut().unwrap();
    (scores.kept, scores.went) =
        (Histogram::default(), Histogram { zero: 9, ..Histogram::default() });
    let shown = shown(&odd);
    assert!(shown.contains("not a number") && shown.contains("infinite"), "{shown}");
    // As the JSON has it, too.
    let json = serde_json::to_string(&odd).unwrap();
    let back: Report = serde_json::from_str(&json).unwrap();
    assert!(back.perplexity[0].found.dense.perplexity.is_nan());
    check(&page(&back).unwrap());
}

#[test]
fn runs_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let path = |name: &str| dir.path().join(name).display().to_string();
    for (name, alpha) in [("a", "refine.0.alpha=0.2"), ("b", "refine.0.alpha=0.05")] {
        let out = format!("output.path={}", path(name));
        let run = barber(&["prune", &recipe, "--set", &out, "--set", alpha]);
        assert_eq!(run.status, 0, "{}", run.stderr);
    }
    let (a, b, html) = (path("a"), path("b"), path("compared.html"));
    let json_of_b = dir.path().join("b/barber-report.json").display().to_string();
    let run = barber(&["compare", &a, &json_of_b, "--html", &html]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let line = |start: &str| {
        let found = run.stdout.lines().find(|line| line.starts_with(start));
        found.unwrap_or_else(|| panic!("no {start} in {}", run.stdout)).to_owned()
    };
    assert!(line("| a ").contains("50.00%") && line("| b ").contains("50.00%"));
    assert!(line("| refine.0.alpha").contains("0.05"));
    assert!(!run.stdout.contains("output.path"));
    let made = fs::read_to_string(&html).unwrap();
    let parsed = check(&made);
    assert_eq!(all(&parsed, "#error svg.chart").len(), 2);
    assert!(text(all(&parsed, "body")[0]).contains("1. a"));
    // It stays what it is unless it is to be replaced.
    let again = barber(&["compare", &a, "--html", &html]);
    assert_eq!(again.status, 1);
    assert!(flat(&again.stderr).contains("--force"), "{}", again.stderr);
    assert_eq!(fs::read_to_string(&html).unwrap(), made);
    assert_eq!(barber(&["compare", &a, "--html", &html, "--force"]).status, 0);
    assert_ne!(fs::read_to_string(&html).unwrap(), made);

    // A directory of runs stands for them; what else is in it is none.
    let all = dir.path().display().to_string();
    let [each, together] = [&["compare", &a, &b][..], &["compare", &all]].map(barber);
    assert_eq!((together.status, &together.stdout), (0, &each.stdout), "{}", together.stderr);

    let run = barber(&["compare", &a, &b, "--json"]);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(found["runs"], serde_json::json!(["a", "b"]));
    let error = found["figures"].as_array().unwrap().iter().find(|of| of["name"] == "output error");
    let report: Value = serde_json::from_str(&fs::read_to_string(&json_of_b).unwrap()).unwrap();
    // Each group counts alike, whatever the size of its error.
    let groups = report["groups"].as_array().unwrap();
    let error_of = |group: &Value, when: &str| group["stages"][0][when]["calibration"].as_f64();
    let quotient = |group| error_of(group, "after").unwrap() / error_of(group, "before").unwrap();
    let expected = groups.iter().map(quotient).sum::<f64>() / groups.len() as f64;
    let found = error.unwrap()["values"][1].as_f64().unwrap();
    assert!((found / expected - 1.0).abs() < 1e-12, "{found} {expected}");
    assert_eq!(report["output_error"]["mean"].as_f64(), Some(found));

    // A report without what earlier versions did not write.
    let mut old = report;
    for key in ["model", "matrices", "memory", "sizes", "recipe"] {
        old.as_object_mut().unwrap().remove(key).unwrap();
    }
    fs::write(path("old.json"), old.to_string()).unwrap();
    assert_eq!(barber(&["compare", &a, &path("old.json")]).status, 0);
    // What is none.
    fs::write(path("none.json"), "{\"barber\": 1}").unwrap();
    for (given, expected) in [("nowhere", "nowhere: "), ("none.json", "not the report of a run")] {
        let run = barber(&["compare", &path(given)]);
        assert_eq!(run.status, 1);
        assert!(flat(&run.stderr).contains(expected), "{}", run.stderr);
    }
    assert_eq!(barber(&["compare"]).status, 2);
}

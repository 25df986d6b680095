//! Runs a command as a user would, and watches its time and memory.

use std::{
    fs,
    hint::black_box,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use dfdx::tensor::Cpu;
use llm_barber::executor::ops::{Hold, InputGradient, Linear, Weight};

/// How a run went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Wall time in seconds.
    pub(crate) seconds: f64,
    /// The most memory that it had of its own, in bytes: without the pages of mapped files.
    pub(crate) memory: u64,
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Run {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let status = format!("/proc/{}/status", child.id());
    let mut memory = 0;
    let end = loop {
        if let Some(end) = child.try_wait().expect("it can be waited for") {
            break end;
        }
        memory = memory.max(anonymous(&status));
        sleep(Duration::from_millis(20));
    };
    assert!(end.success(), "{command:?}: {end}");
    Run { seconds: started.elapsed().as_secs_f64(), memory }
}

fn anonymous(status: &str) -> u64 {
    let text = fs::read_to_string(status).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// The median of some runs' times, and their highest memory.
#[allow(dead_code, reason = "not every benchmark has several runs")]
pub(crate) fn median(runs: &[Run]) -> Run {
    let mut seconds: Vec<f64> = runs.iter().map(|run| run.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let memory = runs.iter().map(|run| run.memory).max().unwrap_or(0);
    Run { seconds: seconds[seconds.len() / 2], memory }
}

/// The machine's best rate of matrix products now, in operations each second: the best of ten products
/// of 2048 × 4096 × 4096.
pub(crate) fn peak() -> f64 {
    const TOKENS: usize = 2048;
    const WIDTH: usize = 4096;
    let device = Cpu::default();
    let values = |n: usize| (0..n).map(|i| (i * 7919 % 2003) as f32 / 1000.0 - 1.0).collect();
    let weight: Vec<f32> = values(WIDTH * WIDTH);
    let weight = Weight::new(&device, &weight, (WIDTH, WIDTH), None).expect("memory");
    let x = device.hold(values(TOKENS * WIDTH), (TOKENS, WIDTH)).expect("memory");
    let seconds = (0..10).map(|_| {
        let started = Instant::now();
        black_box(Cpu::linear(x.clone(), &weight, InputGradient::Skipped, None).expect("memory"));
        started.elapsed().as_secs_f64()
    });
    2.0 * (TOKENS * WIDTH * WIDTH) as f64 / seconds.fold(f64::INFINITY, f64::min)
}

fn report(output: &Path) -> serde_json::Value {
    let report = fs::read(output.join("barber-report.json")).unwrap_or_default();
    serde_json::from_slice(&report).unwrap_or_default()
}

/// A number of the report that a run wrote to `output`.
pub(crate) fn reported(output: &Path, key: &str) -> f64 {
    report(output)[key].as_f64().unwrap_or(f64::NAN)
}

/// What a run did at the layers, without reading texts, writing and evaluating.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtLayers {
    /// Seconds.
    pub(crate) seconds: f64,
    /// Operations of matrix products.
    pub(crate) operations: f64,
    /// Seconds that these took, where they ran.
    pub(crate) product_seconds: f64,
}

/// What the run that wrote to `output` did at the layers.
pub(crate) fn at_layers(output: &Path) -> AtLayers {
    let seconds = &report(output)["seconds"];
    let phases = ["initial masks", "refinement"].iter();
    AtLayers {
        seconds: phases.filter_map(|phase| seconds[phase].as_f64()).sum(),
        operations: reported(output, "operations"),
        product_seconds: reported(output, "product_seconds"),
    }
}

impl AtLayers {
    /// The percentage of the time that was matrix products.
    #[allow(dead_code, reason = "not every benchmark prints it for itself")]
    pub(crate) fn product_time(self) -> f64 {
        100.0 * self.product_seconds / self.seconds
    }

    /// What these did in a second, in percent of a `best` rate.
    pub(crate) fn rate(self, best: f64) -> f64 {
        100.0 * self.operations / self.product_seconds / best
    }
}

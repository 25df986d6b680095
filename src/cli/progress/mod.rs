//! Shows the progress and the remaining time of a run, on a terminal only.

mod clock;

use std::{
    io::{self, Write, stderr},
    sync::{
        LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};

pub(super) use self::clock::on_this_machine;
use self::clock::{Clock, about};
use super::{
    clean::{self, clean},
    print,
    prune::introduce,
};
use crate::{
    checkpoint::Reader,
    family::Decoder,
    plan::Plan,
    progress::{Bar, Steps},
    recipe::Recipe,
    run::{Error, ScheduledPhase, Watch},
};

/// The bars on standard error, which are not drawn if it is not a terminal.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
/// The clock of the process.
static CLOCK: LazyLock<Mutex<Clock>> = LazyLock::new(Mutex::default);
/// Whether only results and errors are printed.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Turns off all output except errors, log lines too: another process prints it.
pub(super) fn mute() {
    silence();
    print::mute();
}

/// Turns off all output except results and errors.
pub(super) fn silence() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Standard error for log lines, which are printed above the bars. Errors of writing are ignored.
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if print::is_mute() {
            return Ok(bytes.len());
        }
        if BARS.is_hidden() {
            let _ = stderr().write_all(bytes);
        } else {
            let _ = BARS.println(String::from_utf8_lossy(bytes).trim_end_matches('\n'));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn clock() -> MutexGuard<'static, Clock> {
    CLOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows the progress of a run on the terminal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terminal {
    /// Whether nothing is shown.
    pub(super) quiet: bool,
}

impl Terminal {
    /// Whether progress is shown.
    pub(super) fn speaks(self) -> bool {
        !self.quiet && !QUIET.load(Ordering::Relaxed)
    }

    /// Prints a line above the bars; if no bars are drawn, a log entry.
    pub(super) fn note(&self, line: &str) {
        if BARS.is_hidden() {
            tracing::info!("{line}");
        } else if self.speaks() {
            // Errors are ignored: the terminal may be gone.
            let _ = BARS.println(clean(line));
        }
    }
}

/// A bar on the terminal, until it is dropped.
struct Drawn(ProgressBar);

impl Bar for Drawn {
    fn advance(&self, steps: u64) {
        self.0.inc(steps);
    }

    fn reach(&self, steps: u64) {
        self.0.set_position(steps);
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Watch for Terminal {
    fn begin(&self, recipe: &Recipe, dense: &Reader, decoder: &Decoder, plan: &Plan) {
        if self.speaks() {
            introduce(recipe, dense, decoder, plan);
        }
    }

    fn takes(&self, time: &dyn Fn() -> Result<Duration, Error>) {
        // An error of the device will be reported by the run.
        if self.speaks()
            && let Ok(time) = time()
        {
            println!("takes     {}", on_this_machine(time));
        }
    }

    fn resumes(&self, from: Option<&str>) {
        if self.speaks() {
            println!("resumed   {}", from.unwrap_or("nothing was saved: from the beginning"));
        }
    }

    fn expect(&self, phases: &[ScheduledPhase]) {
        clock().expect(phases);
    }

    /// A bar on standard error, which is drawn only on a terminal.
    fn bar(&self, phase: &str, steps: Steps) -> Box<dyn Bar> {
        clock().begin(phase, Instant::now());
        if !self.speaks() {
            return Box::new(());
        }
        let bar = BARS.add(ProgressBar::new(steps.count()));
        let place = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            let now = Instant::now();
            let mut clock = clock();
            clock.step(f64::from(state.fraction()), now);
            let left = clock.left(now);
            let left = left.map_or_else(String::new, |left| format!(", {} left", about(left)));
            // Errors of formatting are ignored.
            let _ = write!(text, "{}{left}", far(state.pos(), steps));
        };
        let style = "{spinner:.cyan} {msg:26!} {wide_bar:.cyan/dim}  {place}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("━╸─").with_key("place", place));
        }
        bar.set_message(clean::line(phase));
        bar.enable_steady_tick(Duration::from_millis(200));
        Box::new(Drawn(bar))
    }
}

/// The progress of a phase, in words.
fn far(done: u64, steps: Steps) -> String {
    match steps {
        Steps::Layers(layers) => format!("layer {done}/{layers}"),
        Steps::Parts(parts) => format!("{}%", 100 * done / parts.max(1)),
        Steps::Bytes(bytes) => {
            let [done, all] = [done, bytes].map(|bytes| ByteSize(bytes).display().si());
            format!("{done}/{all}")
        }
    }
}

//! Progress bars: on a terminal only.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of so many steps, on the terminal's error stream; nothing is drawn elsewhere.
pub(super) fn bar(name: &str, steps: u64, quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let bar = ProgressBar::with_draw_target(Some(steps), target);
    let style = "{msg:28} {bar:32} {pos:>4}/{len} · {elapsed} · {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_message(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A line between bars, where bars are drawn.
pub(super) fn note(line: &str, quiet: bool) {
    if !quiet && stderr().is_terminal() {
        eprintln!("{line}");
    }
}

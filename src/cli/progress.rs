//! Progress bars: on a terminal only.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::prune::introduce;
use crate::{family::Decoder, plan::Plan, recipe::Recipe, run::Watch};

/// Shows how a run goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terminal {
    /// Says nothing.
    pub(super) quiet: bool,
}

impl Watch for Terminal {
    fn begin(&self, recipe: &Recipe, decoder: &Decoder, plan: &Plan) {
        if !self.quiet {
            introduce(recipe, decoder, plan);
        }
    }

    fn resumes(&self, from: Option<&str>) {
        if !self.quiet {
            println!("resumed   {}", from.unwrap_or("nothing was saved: from the beginning"));
        }
    }

    /// A bar on the terminal's error stream; nothing is drawn elsewhere.
    fn bar(&self, phase: &str, steps: u64) -> ProgressBar {
        let target =
            if self.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        let style = "{msg:28} {bar:32} {pos:>4}/{len} · {elapsed} · {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_message(phase.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

impl Terminal {
    /// A line between bars, where bars are drawn.
    pub(super) fn note(&self, line: &str) {
        if !self.quiet && stderr().is_terminal() {
            eprintln!("{line}");
        }
    }
}

//! Verbosity and colours of messages.

use clap::{ArgAction, ColorChoice};
use tracing_subscriber::{EnvFilter, field::MakeExt, fmt::format::debug_fn};

use super::{Error, clean, progress};

/// The options that every command has.
#[derive(clap::Args)]
#[command(next_help_heading = "Terminal")]
#[group(skip)]
pub(super) struct Arguments {
    /// Print only the result and errors: no progress, no warnings.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Print more: each group's error before and after each stage; -vv: each matrix's swaps.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Whether messages and progress have colours; `auto` depends on the terminal and NO_COLOR.
    #[arg(long, global = true, value_name = "WHEN", default_value_t = ColorChoice::Auto)]
    color: ColorChoice,
}

impl Arguments {
    /// Configures errors, log lines and progress bars. Options override BARBER_LOG, as `--set`
    /// overrides the environment.
    pub(super) fn apply(&self) -> Result<(), Error> {
        match self.color {
            ColorChoice::Auto => {}
            ColorChoice::Always => console::set_colors_enabled_stderr(true),
            ColorChoice::Never => console::set_colors_enabled_stderr(false),
        }
        let colours = console::colors_enabled_stderr();
        // Paths are not broken over lines, so that they can be clicked and searched for.
        let _ = miette::set_hook(Box::new(move |_| {
            let options = miette::MietteHandlerOpts::new().color(colours).wrap_lines(false);
            Box::new(clean::Handler(options.build()))
        }));
        if self.quiet {
            progress::silence();
        }
        // A second call in one process keeps the first one's subscriber.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(self.filter()?)
            .with_writer(|| progress::Lines)
            .fmt_fields(
                debug_fn(|to, field, value| {
                    let value = clean::line(&format!("{value:?}"));
                    match field.name() {
                        "message" => write!(to, "{value}"),
                        name => write!(to, "{name}={value}"),
                    }
                })
                .delimited(" "),
            )
            .with_ansi(colours)
            .without_time()
            .with_target(false)
            .try_init();
        Ok(())
    }

    fn filter(&self) -> Result<EnvFilter, Error> {
        let variable = std::env::var("BARBER_LOG").ok().filter(|text| !text.is_empty());
        match (self.quiet, self.verbose, variable) {
            (true, ..) => Ok(EnvFilter::new("error")),
            (_, 0, Some(text)) => EnvFilter::try_new(&text).map_err(|e| Error::Log(e.to_string())),
            (_, 0, None) => Ok(EnvFilter::new("warn")),
            (_, 1, _) => Ok(EnvFilter::new("info")),
            (..) => Ok(EnvFilter::new("debug")),
        }
    }
}

//! `barber completions` and `barber man`: shell completions and manual pages.

use std::{fs, path::PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Error, print, write};

/// Prints what a shell needs to complete commands, options and their values:
///
///   barber completions bash > ~/.local/share/bash-completion/completions/barber
///   barber completions zsh > ~/.zfunc/_barber
///   barber completions fish > ~/.config/fish/completions/barber.fish
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CompletionsArguments {
    /// The shell.
    shell: Shell,
}

pub(super) fn completions(arguments: &CompletionsArguments) {
    let mut script = Vec::new();
    clap_complete::generate(
        arguments.shell,
        &mut super::Arguments::command(),
        "barber",
        &mut script,
    );
    print::bytes(&script);
}

/// Prints the manual page, or writes one for the program and one for each command:
///
///   barber man | man -l -
///   barber man --output ~/.local/share/man/man1
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct ManArguments {
    /// Write barber.1, barber-prune.1 and so on into a directory, replacing existing ones.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(super) fn man(arguments: &ManArguments) -> Result<(), Error> {
    let command = super::Arguments::command().disable_help_subcommand(true);
    match &arguments.output {
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page).map_err(Error::Page)?;
            print::bytes(&page);
        }
        Some(dir) => {
            let failed = |source| Error::File { path: dir.clone(), source };
            fs::create_dir_all(dir).map_err(failed)?;
            let mut command = command;
            command.build();
            let shown = command.get_subcommands().filter(|of| !of.is_hide_set());
            for of in shown.chain([&command]) {
                let (page, mut text) = (Man::new(of.clone()), Vec::new());
                page.render(&mut text).map_err(Error::Page)?;
                write::new(&dir.join(page.get_filename()), &text, true)?;
            }
        }
    }
    Ok(())
}

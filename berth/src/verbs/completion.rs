//! `berth completion`: a shell's script, made of the command line's own table, so that it offers what berth takes and nothing else.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli;

/// Prints the script.
pub fn run(shell: cli::Shell) -> Result<ExitCode> {
    crate::out(script(shell)?.trim_end());
    Ok(ExitCode::SUCCESS)
}

fn script(shell: cli::Shell) -> Result<String> {
    let shell = match shell {
        cli::Shell::Bash => Shell::Bash,
        cli::Shell::Zsh => Shell::Zsh,
        cli::Shell::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown(&cli::Cli::command()), "berth", &mut script);
    String::from_utf8(script).context("the script")
}

/// The command without what its help does not show: the upstream kubelet's flags are taken, and hide ours among a hundred.
fn shown(command: &Command) -> Command {
    let mut kept = Command::new(command.get_name().to_owned())
        .disable_help_flag(command.is_disable_help_flag_set())
        .disable_help_subcommand(true)
        .propagate_version(true)
        .args(command.get_arguments().filter(|arg| !arg.is_hide_set()))
        .subcommands(command.get_subcommands().filter(|verb| !verb.is_hide_set()).map(shown));
    if let Some(about) = command.get_about() {
        kept = kept.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        kept = kept.version(version.to_owned());
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command as Process, Stdio};

    use clap::ValueEnum;

    use super::*;

    /// What bash offers for a command line whose last word is being typed.
    fn offered(line: &str) -> Vec<String> {
        let words: Vec<&str> = line.split(' ').collect();
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let (last, before) = (words[words.len() - 1], words.get(words.len().wrapping_sub(2)).copied().unwrap_or(""));
        let mut input = script(cli::Shell::Bash).unwrap();
        input += &format!(
            "\nCOMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=(); _berth berth '{last}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
            quoted.join(" "),
            words.len() - 1
        );
        let mut bash = Process::new("bash").arg("--norc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        bash.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = bash.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim().to_owned()).filter(|l| !l.is_empty()).collect()
    }

    #[test]
    fn bash_offers_every_verb() {
        let offered = offered("berth ");
        for verb in cli::Cli::command().get_subcommands() {
            assert!(offered.iter().any(|word| word == verb.get_name()), "{} is not in {offered:?}", verb.get_name());
        }
    }

    #[test]
    fn bash_offers_the_flags_of_each_verb_that_are_shown_in_its_help() {
        let command = cli::Cli::command();
        for verb in command.get_subcommands() {
            let offered = offered(&format!("berth {} --", verb.get_name()));
            for arg in verb.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let Some(long) = arg.get_long() else { continue };
                let wanted = format!("--{long}");
                assert!(offered.contains(&wanted), "{wanted} of {} is not in {offered:?}", verb.get_name());
            }
        }
    }

    #[test]
    fn bash_completes_what_was_begun() {
        assert_eq!(offered("berth jo"), ["join"]);
        assert_eq!(offered("berth join --ca-"), ["--ca-hash"]);
        assert_eq!(offered("berth image p"), ["pull"]);
        assert_eq!(offered("berth pods --output j"), ["json"]);
        assert_eq!(offered("berth completion f"), ["fish"]);
        assert!(offered("berth node --max-p").is_empty(), "the upstream's flags are taken, and not offered");
    }

    #[test]
    fn each_shell_has_a_script_that_names_the_verbs() {
        for shell in cli::Shell::value_variants() {
            let script = script(*shell).unwrap();
            assert!(["join", "leaks", "completion"].iter().all(|verb| script.contains(verb)), "{shell:?}");
        }
    }
}

//! The flags of the upstream's kubelet that are fields of KubeletConfiguration, taken as they are. Owns their grammar on the command
//! line; what they mean is the kubelet's business.

use berth_kubelet::configuration::{FlagDescription, flag_descriptions};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

/// The flags that were given, with their texts.
#[derive(Debug, Clone, Default)]
pub struct UpstreamFlags(pub Vec<(String, String)>);

/// Whether the command has a flag of this name already.
fn is_taken(command: &Command, name: &str) -> bool {
    command.get_arguments().any(|arg| {
        arg.get_long() == Some(name)
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
            || arg.get_id() == name
    })
}

fn argument(flag: &FlagDescription) -> Arg {
    let arg = Arg::new(flag.name).long(flag.name).hide(true).action(ArgAction::Append).value_name("VALUE");
    let arg = if flag.name == "v" { arg.short('v') } else { arg };
    if flag.is_switch {
        // As Go has it: `--flag` and `--flag=false`.
        return arg.num_args(0..=1).require_equals(true).default_missing_value("true");
    }
    arg.allow_hyphen_values(true)
}

impl Args for UpstreamFlags {
    fn augment_args(command: Command) -> Command {
        flag_descriptions()
            .iter()
            .fold(command, |command, flag| if is_taken(&command, flag.name) { command } else { command.arg(argument(flag)) })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for UpstreamFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for flag in flag_descriptions() {
            // Flags that are declared elsewhere are not in these matches under this name, or are of another type.
            let Ok(Some(values)) = matches.try_get_many::<String>(flag.name) else { continue };
            let mut values: Vec<String> = values.cloned().collect();
            let text = if flag.is_list { values.join(",") } else { values.pop().unwrap_or_default() };
            given.push((flag.name.to_owned(), text));
        }
        Ok(UpstreamFlags(given))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Go's flags may be written with underscores.
pub fn with_dashes(args: Vec<std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let dashed = |arg: std::ffi::OsString| match arg.to_str() {
        Some(text) if text.starts_with("--") => {
            let (name, rest) = text.split_at(text.find('=').unwrap_or(text.len()));
            format!("{}{rest}", name.replace('_', "-")).into()
        }
        _ => arg,
    };
    args.into_iter().map(dashed).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::{Cli, Verb};

    fn flags(args: &[&str]) -> Vec<(String, String)> {
        let args = super::with_dashes(args.iter().map(Into::into).collect());
        match Cli::try_parse_from(args).expect("parsed").verb {
            Verb::Kubelet(args) => args.kubelet.upstream.0,
            Verb::Node(args) => args.kubelet.upstream.0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_upstreams_flags_are_taken_as_it_takes_them() {
        let given = flags(&[
            "berth",
            "kubelet",
            "--max_pods=7",
            "--fail-swap-on=false",
            "--seccomp-default",
            "--v",
            "2",
            "--pod-max-pids",
            "-1",
        ]);
        let mut given: Vec<_> = given.iter().map(|(name, text)| format!("{name}={text}")).collect();
        given.sort();
        assert_eq!(given, ["fail-swap-on=false", "max-pods=7", "pod-max-pids=-1", "seccomp-default=true", "v=2"]);
        let lists = flags(&["berth", "node", "--eviction-hard=memory.available<1Gi", "--eviction-hard=nodefs.available<5%"]);
        assert_eq!(lists, [("eviction-hard".to_owned(), "memory.available<1Gi,nodefs.available<5%".to_owned())]);
    }

    #[test]
    fn of_a_flag_that_comes_twice_the_last_one_counts() {
        let twice = [
            "--node-ip=10.0.0.1",
            "--node-ip=10.0.0.2,fd00::1",
            "--config=/a",
            "--config=/b",
            "--kubeconfig=/c",
            "--kubeconfig=/d",
        ];
        let parsed = Cli::try_parse_from(["berth", "kubelet"].iter().chain(&twice)).expect("parsed");
        let Verb::Kubelet(args) = parsed.verb else { panic!("kubelet") };
        let addresses: Vec<String> = args.kubelet.node_ip.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.0.0.2", "fd00::1"]);
        assert_eq!(parsed.global.config.as_deref(), Some(std::path::Path::new("/b")));
        assert_eq!(args.kubelet.kubeconfig.as_deref(), Some(std::path::Path::new("/d")));
    }

    #[test]
    fn kubeadms_command_line_is_understood() {
        let args = [
            "berth",
            "kubelet",
            "--config=/var/lib/kubelet/config.yaml",
            "--config-dir=/d",
            "--container-runtime-endpoint=unix:///s",
            "--node-ip=10.0.0.1,fd00::1",
            "--hostname-override=n",
            "--register-with-taints=a=b:NoSchedule",
            "--root-dir=/k",
        ];
        let Verb::Kubelet(parsed) = Cli::try_parse_from(args).expect("parsed").verb else { panic!("kubelet") };
        assert_eq!(parsed.container_runtime_endpoint.as_deref(), Some("unix:///s"));
        assert_eq!(parsed.kubelet.node_ip.len(), 2);
        assert!(Cli::try_parse_from(["berth", "kubelet", "--no-such-flag=1"]).is_err());
        assert!(Cli::try_parse_from(["berth", "kubelet", "positional"]).is_err());
    }
}

//! Which method, with which options.

use super::args::{ModelArgs, about_plan, read_plan};
use super::forecast_args::ForecastArgs;
use crate::engine::EngineBuilder;
use crate::select::{METHODS, MethodSpec, OPTIONS, OptionInfo};
use anyhow::{Result, anyhow, bail};
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use std::path::PathBuf;

fn method_help() -> String {
    let lines: Vec<_> = METHODS.iter().map(|m| format!("  {:<20} {}", m.name, m.about)).collect();
    format!("Which tokens each decode step attends to:\n{}", lines.join("\n"))
}

/// Arguments that a finished plan leaves nothing to decide for.
fn planned() -> impl Iterator<Item = &'static str> {
    std::iter::once("method").chain(OPTIONS.iter().map(|o| o.name))
}

/// Which tokens are attended to.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sparse attention")]
pub struct MethodArgs {
    /// Method; --help lists them
    #[arg(long, default_value = "sparcas", long_help = method_help())]
    pub method: MethodSpec,
    /// A plan file instead of --method and its options (see `longsight plan --save`)
    #[arg(long, value_name = "FILE", conflicts_with_all = planned())]
    pub plan: Option<PathBuf>,
    #[command(flatten)]
    pub forecast: ForecastArgs,
    #[command(flatten)]
    pub options: MethodOptions,
}

/// Options of which `longsight eval` takes several values each.
pub const SWEPT: [&str; 4] = ["budget", "dims", "update", "metric"];

/// Options on top of a method's defaults, by name: all of them, or those that are not [`SWEPT`].
#[derive(Clone, Debug, Default)]
pub struct Options<const ALL: bool>(Vec<(&'static str, String)>);

pub type MethodOptions = Options<true>;
pub type OtherOptions = Options<false>;

impl<const ALL: bool> Options<ALL> {
    fn known() -> impl Iterator<Item = &'static OptionInfo> {
        OPTIONS.iter().filter(|o| ALL || !SWEPT.contains(&o.name))
    }
}

impl OtherOptions {
    /// With values of others.
    pub fn and(&self, others: impl IntoIterator<Item = (&'static str, String)>) -> MethodOptions {
        Options(others.into_iter().chain(self.0.iter().cloned()).collect())
    }
}

fn arg(o: &'static OptionInfo) -> Arg {
    let read = |s: &str| MethodSpec::default().set(o.name, s).map(|()| s.to_owned());
    let arg = Arg::new(o.name)
        .long(o.name)
        .value_name(o.value)
        .value_parser(read)
        .help_heading("Sparse attention")
        .help(o.help.trim());
    if o.name == "floor" { arg.conflicts_with("mass") } else { arg }
}

impl<const ALL: bool> Args for Options<ALL> {
    fn augment_args(command: Command) -> Command {
        command.args(Self::known().map(arg))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<const ALL: bool> FromArgMatches for Options<ALL> {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let given = |o: &OptionInfo| Some((o.name, matches.get_one::<String>(o.name)?.clone()));
        Ok(Options(Self::known().filter_map(given).collect()))
    }

    fn update_from_arg_matches(
        &mut self,
        matches: &ArgMatches,
    ) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Refuses an option that none of the methods, called `names`, reads, and says which do.
pub fn read_by_one(option: &str, methods: &[MethodSpec], names: &[&str]) -> Result<()> {
    if methods.iter().any(|m| m.variant.takes(option)) {
        return Ok(());
    }
    let read_by: Vec<_> =
        METHODS.iter().filter(|m| m.variant.takes(option)).map(|m| m.name).collect();
    bail!(
        "--{option} changes nothing in {}; leave it out, or take a method that reads it: {}",
        names.join(", "),
        read_by.join(", ")
    )
}

impl MethodOptions {
    /// A method's name, with its own values of these options replaced: `sparcas:budget=256` with `--budget 512` is
    /// `sparcas:budget=512`.
    pub fn renamed(&self, name: &str) -> String {
        let part = |part: &str| match part.split_once('=') {
            Some((key, _)) => match self.0.iter().rev().find(|(option, _)| *option == key) {
                Some((_, value)) => format!("{key}={value}"),
                None => part.to_owned(),
            },
            None => part.to_owned(),
        };
        name.split(':').map(part).collect::<Vec<_>>().join(":")
    }

    /// The methods with these options on top, each with those that it reads.
    ///
    /// # Errors
    /// An option that none of the methods reads.
    pub fn apply(&self, methods: &[MethodSpec]) -> Result<Vec<MethodSpec>> {
        for (option, _) in &self.0 {
            let names: Vec<_> = methods.iter().map(MethodSpec::name).collect();
            read_by_one(option, methods, &names)?;
        }
        let with = |m: &MethodSpec| {
            let (mut m, variant) = (m.clone(), m.variant);
            for (option, value) in self.0.iter().filter(|(o, _)| variant.takes(o)) {
                m.set(option, value).map_err(|e| anyhow!("--{option} {value}: {e}"))?;
            }
            Ok(m.with_read_options_only())
        };
        methods.iter().map(with).collect()
    }
}

impl MethodArgs {
    /// The method with its options.
    ///
    /// # Errors
    /// An option that the method does not read.
    pub fn spec(&self) -> Result<MethodSpec> {
        let specs = self.options.apply(std::slice::from_ref(&self.method))?;
        Ok(specs.into_iter().next().unwrap_or_default())
    }

    /// `e`, with the name of the plan's file where it is about that.
    pub fn about(&self, e: impl Into<anyhow::Error>) -> anyhow::Error {
        match &self.plan {
            Some(file) => about_plan(file.display(), e),
            None => e.into(),
        }
    }

    /// A builder with this method on this model.
    ///
    /// # Errors
    /// A plan file that cannot be read, or an option that the method does not read.
    pub fn builder(&self, model: &ModelArgs) -> Result<EngineBuilder<'static>> {
        let builder = self.forecast.set(model.builder());
        Ok(match &self.plan {
            Some(path) => {
                let plan = read_plan(path)?;
                self.forecast.read_by_one(&[(&plan.method, plan.wants_forecast())])?;
                builder.plan(plan)
            }
            None => {
                let spec = self.spec()?;
                self.forecast.read_by_one(&[(spec.name(), spec.wants_forecast())])?;
                builder.method(spec)
            }
        })
    }
}

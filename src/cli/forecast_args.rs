//! `--forecast`: where the Forecast of this model is.

use super::output::quoted;
use crate::engine::EngineBuilder;
use crate::model::{Checkpoint, Forecast};
use crate::select::{MethodSpec, Plan};
use anyhow::{Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};

/// What chooses blocks before the layer itself can.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sparse attention")]
pub struct ForecastArgs {
    /// Forecast trained for this model (safetensors), with which sparda, and nosa with --query forecast, choose blocks;
    /// `lookahead`: the next layer's own queries, read off this layer's input, without training
    #[arg(long, value_name = "FILE")]
    forecast: Option<PathBuf>,
}

impl ForecastArgs {
    /// The file; none for the lookahead.
    fn file(&self) -> Option<&Path> {
        self.forecast.as_deref().filter(|f| *f != Path::new("lookahead"))
    }

    /// Refuses a Forecast that none of these reads: the name of each, and whether it does.
    ///
    /// # Errors
    /// A Forecast that would change nothing.
    pub fn read_by_one(&self, all: &[(&str, bool)]) -> Result<()> {
        if self.forecast.is_none() || all.iter().any(|(_, reads)| *reads) {
            return Ok(());
        }
        let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        bail!(
            "--forecast changes nothing in {}; leave it out, or take --method sparda (for NOSA models nosa with --query \
             forecast)",
            names.join(", ")
        )
    }

    /// [`ForecastArgs::read_by_one`] of named methods and plans.
    ///
    /// # Errors
    /// As there.
    pub fn read_by_one_of(
        &self,
        specs: &[(String, MethodSpec)],
        plans: &[(String, Plan)],
    ) -> Result<()> {
        let specs = specs.iter().map(|(name, s)| (name.as_str(), s.wants_forecast()));
        let plans = plans.iter().map(|(name, p)| (name.as_str(), p.wants_forecast()));
        self.read_by_one(&specs.chain(plans).collect::<Vec<_>>())
    }

    /// The option as it was given, or as it has to be.
    pub fn option(&self) -> String {
        let file = self.forecast.as_deref().unwrap_or(Path::new("FILE"));
        format!("--forecast {}", quoted(&file.display().to_string()))
    }

    /// Hands it to an engine.
    pub fn set<'a>(&self, builder: EngineBuilder<'a>) -> EngineBuilder<'a> {
        let lookahead = self.forecast.is_some() && self.file().is_none();
        builder.forecast(self.file().map(Path::to_owned)).lookahead(lookahead)
    }

    /// Opens the file without an engine; whether a Forecast was given.
    ///
    /// # Errors
    /// A file that is no Forecast, or that of another model.
    pub fn check(&self, checkpoint: &Checkpoint) -> Result<bool> {
        if let Some(file) = self.file() {
            Forecast::open(file, checkpoint.config(), &checkpoint.fingerprint())?;
        }
        Ok(self.forecast.is_some())
    }
}

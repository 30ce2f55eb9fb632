//! Errors of planning and selection.

use crate::backend::BackendError;
use thiserror::Error;

/// What can go wrong when a method is planned or run.
#[derive(Debug, Error)]
pub enum SelectError {
    /// A name that is no method.
    #[error("unknown method {name:?}; known: {known}{meant}")]
    UnknownMethod {
        /// What was asked for.
        name: String,
        /// Comma-separated names.
        known: String,
        /// "; did you mean `x`?", or nothing.
        meant: String,
    },
    /// Options that do not fit the model or each other.
    #[error("method {method}: {reason}")]
    BadPlan {
        /// Method name.
        method: String,
        /// What does not fit, and what would.
        reason: String,
    },
    /// A plan file made for another model.
    #[error(
        "this plan was made for model {plan_model} ({plan_layers} layers), the loaded model is \
         {model} ({layers} layers); make a new plan for it"
    )]
    WrongModel {
        /// Fingerprint in the plan.
        plan_model: String,
        /// Layers in the plan.
        plan_layers: usize,
        /// Fingerprint of the model.
        model: String,
        /// Layers of the model.
        layers: usize,
    },
    /// The cache was built without something that the method reads.
    #[error(
        "method {method} needs {what}, which this cache does not keep; build the engine with it"
    )]
    MissingSummary {
        /// Method name.
        method: String,
        /// `the int8 key copy`, `key statistics`, `energy-sorted keys`, `the sums of the values`, `a profile of this
        /// model's keys` or `summaries of the keys`.
        what: &'static str,
    },
    /// A Forecast is needed and none was given.
    #[error(
        "method {method} scores with a Forecast of this model, and none was given: name its file with --forecast, \
         train one with `longsight train-forecast`, or do without training: --forecast lookahead"
    )]
    NoForecast {
        /// Method name.
        method: String,
    },
    /// The audit contradicts itself.
    #[error(
        "the audit of layer {layer} finds {recall} of all attention mass on the selected tokens, which cannot be \
         more than 1: this device computes attention wrongly"
    )]
    AuditMismatch {
        /// Layer.
        layer: usize,
        /// Attention mass on the selected tokens over that on all.
        recall: f32,
    },
    /// A file of head maps that cannot be used.
    #[error("head maps: {reason}")]
    BadHeadMaps {
        /// What is wrong with it.
        reason: String,
    },
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl SelectError {
    /// The same error of the method `name`: selectors know their plan, not what it is called.
    #[must_use]
    pub fn of_method(mut self, name: &str) -> Self {
        if let SelectError::BadPlan { method, .. } | SelectError::MissingSummary { method, .. } =
            &mut self
        {
            *method = name.into();
        }
        self
    }
}

//! Which options of the command line an error of the library is about. The library names none: it does not know who
//! calls it.

use super::args::PlanFile;
use crate::backend::BackendError;
use crate::bench::BenchError;
use crate::calibrate::CalibrateError;
use crate::engine::EngineError;
use crate::eval::SampleError;
use crate::files::cache_dir;
use crate::model::{LoadError, ModelError};
use crate::select::{METHODS, SelectError};
use std::error::Error;

/// A line for the first cause that options can change; `calibrates`: the command is `calibrate`, whose pieces have other
/// options than those of `train-forecast`.
pub fn hint(e: &anyhow::Error, calibrates: bool) -> Option<String> {
    if let Some(SelectError::BadPlan { method, .. }) = bad_plan(e) {
        return Some(match e.downcast_ref::<PlanFile>() {
            Some(file) => format!(
                "edit the layer in {file} (budget.tokens, keep.sinks, keep.recent, scorer and so on), or write another \
                 with `longsight plan --save`"
            ),
            None => options_of(method),
        });
    }
    e.chain().map(inner).find_map(|cause| match (cause.downcast_ref(), cause.downcast_ref()) {
        (Some(e), _) => calibrate(e, calibrates),
        (None, Some(EngineError::BadContext { most, .. })) => Some(format!(
            "--ctx takes up to {most} with this model; for longer texts name one that was trained for them (-m)"
        )),
        _ => fixed(cause).map(String::from),
    })
}

/// What is wrong with a plan, where that is what `e` says.
pub fn bad_plan(e: &anyhow::Error) -> Option<&SelectError> {
    e.chain()
        .find_map(|cause| inner(cause).downcast_ref())
        .filter(|e| matches!(e, SelectError::BadPlan { .. } | SelectError::WrongModel { .. }))
}

/// The error that others hold in transparent variants, which leave it out of their chains of causes.
fn inner<'e>(cause: &'e (dyn Error + 'static)) -> &'e (dyn Error + 'static) {
    let held: Option<&'e (dyn Error + 'static)> = if let Some(e) = cause.downcast_ref() {
        match e {
            CalibrateError::Engine(e) => Some(e),
            CalibrateError::Model(e) => Some(e),
            _ => None,
        }
    } else if let Some(e) = cause.downcast_ref() {
        match e {
            BenchError::Backend(e) => Some(e),
            BenchError::Engine(e) => Some(e),
            BenchError::Select(e) => Some(e),
            BenchError::BadOption(_) => None,
        }
    } else if let Some(e) = cause.downcast_ref() {
        match e {
            EngineError::Backend(e) => Some(e),
            EngineError::Select(e) => Some(e),
            EngineError::Model(e) => Some(e),
            _ => None,
        }
    } else if let Some(e) = cause.downcast_ref() {
        match e {
            LoadError::Backend(e) => Some(e),
            LoadError::Model(e) => Some(e),
        }
    } else if let Some(SelectError::Backend(e)) = cause.downcast_ref() {
        Some(e)
    } else if let Some(SampleError::Model(e)) = cause.downcast_ref() {
        Some(e)
    } else {
        None
    };
    held.map_or(cause, inner)
}

/// The options that change a method: one of them is at fault.
fn options_of(method: &str) -> String {
    let options = match METHODS.iter().find(|m| m.name == method) {
        Some(m) => m.variant.options().map(|o| format!("--{o}")).collect::<Vec<_>>().join(", "),
        None => "--dims, --budget, --sinks, --recent, --anchors and the like".into(),
    };
    format!("{options} change this method; see --help")
}

fn fixed(cause: &(dyn Error + 'static)) -> Option<&'static str> {
    if let Some(e) = cause.downcast_ref() {
        engine(e)
    } else if let Some(e) = cause.downcast_ref() {
        select(e)
    } else if let Some(e) = cause.downcast_ref() {
        backend(e)
    } else if let Some(e) = cause.downcast_ref() {
        model(e)
    } else if let Some(SampleError::TextTooShort { .. }) = cause.downcast_ref() {
        Some("--text gives the text, --lengths the tokens of a sample")
    } else if let Some(SampleError::TooFewTokens { .. }) = cause.downcast_ref() {
        Some(
            "--lengths gives the tokens of a sample; --score, --steps, --keys and --needles, where there are \
                 any, say what has to fit",
        )
    } else {
        None
    }
}

fn calibrate(e: &CalibrateError, calibrates: bool) -> Option<String> {
    match e {
        CalibrateError::TooLittleText { .. } => Some(format!(
            "--text gives the texts, --tokens the tokens of a piece, {} how many",
            if calibrates { "--prompts" } else { "--pieces and --held-out" }
        )),
        CalibrateError::NoChoice { tokens, block, budget, least } => {
            let most = tokens.saturating_sub(1) / block.max(&1);
            let longer = |budget: usize| budget.saturating_mul(*block).saturating_add(1);
            Some(match *least <= most {
                true => format!(
                    "--tokens gives the tokens of a piece (here at least {}), --blocks the budget (here at least \
                     {least}, at most {most})",
                    longer(*budget)
                ),
                // No budget would do.
                false => format!(
                    "--tokens gives the tokens of a piece: at least {} for the smallest budget beside --init-blocks and \
                     --local-blocks, --blocks {least}",
                    longer(*least)
                ),
            })
        }
        CalibrateError::OtherSettings { changed, .. } => {
            let options: Vec<String> =
                changed.iter().map(|c| option(&c.name, calibrates)).collect();
            Some(format!("to go on with that run, give its own {}", options.join(", ")))
        }
        _ => None,
    }
}

/// The option that sets a setting of a run.
fn option(setting: &str, calibrates: bool) -> String {
    let name = match setting {
        "grid.budget" => "blocks",
        "grid.init" => "init-blocks",
        "grid.local" => "local-blocks",
        "optimizer.rate" => "rate",
        "schedule.decay" => "schedule",
        "own" => "own-tile",
        "generated" => "generate",
        "texts" if calibrates => "text",
        "texts" => "text (and --tokens, --pieces)",
        other => other.rsplit('.').next().unwrap_or(other),
    };
    format!("--{}", name.replace('_', "-"))
}

fn engine(e: &EngineError) -> Option<&'static str> {
    match e {
        // Where the model itself ends, no option helps.
        EngineError::ContextTooLong { trained: true, .. } => None,
        EngineError::ContextTooLong { .. } => Some("--ctx sets the context, in tokens"),
        EngineError::TooLarge { .. } => Some(
            "--ctx sets the context, --dtype and --kv-dtype the storage, --device the device; LONGSIGHT_MEMORY_CHECK=off \
             loads the model all the same",
        ),
        EngineError::Cache(_) => Some("--ctx sets the context, and with it the size of the cache"),
        _ => None,
    }
}

fn select(e: &SelectError) -> Option<&'static str> {
    match e {
        SelectError::WrongModel { .. } => Some("`longsight plan --save` writes a plan"),
        _ => None,
    }
}

fn model(e: &ModelError) -> Option<&'static str> {
    match e {
        ModelError::Io { path, .. } if cache_dir().is_some_and(|cache| path.starts_with(cache)) => {
            Some(
                "LONGSIGHT_CACHE names the folder that models and what belongs to them are kept in",
            )
        }
        _ => None,
    }
}

fn backend(e: &BackendError) -> Option<&'static str> {
    match e {
        e if e.is_full() => {
            Some("--ctx sets the context, --dtype and --kv-dtype the storage, --device the device")
        }
        BackendError::Unavailable { .. } => Some("--device chooses, `longsight devices` lists"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::PageError;

    #[test]
    fn errors_name_no_option_and_hints_do() {
        let full = || BackendError::OutOfMemory { what: "key cache".into(), need: 2, free: 1 };
        let bad_plan = |method: &str| {
            EngineError::from(SelectError::BadPlan { method: method.into(), reason: "r".into() })
        };
        let cases: Vec<(anyhow::Error, &str)> = vec![
            (full().into(), "--ctx"),
            (EngineError::from(full()).into(), "--ctx"),
            (
                EngineError::from(SelectError::from(BackendError::Unavailable {
                    backend: "cuda",
                    reason: "no driver".into(),
                }))
                .into(),
                "--device",
            ),
            (EngineError::BadContext { context: 9, most: 8 }.into(), "--ctx takes up to 8"),
            (EngineError::TooLarge { weights: 9, tokens: 64, cache: 8, free: 7 }.into(), "--ctx"),
            (
                EngineError::ContextTooLong {
                    tokens: 9,
                    room: String::new(),
                    limit: 8,
                    trained: false,
                }
                .into(),
                "--ctx",
            ),
            (EngineError::from(PageError { need: 2, free: 1, total: 9 }).into(), "--ctx"),
            (SelectError::BadPlan { method: "m".into(), reason: "r".into() }.into(), "--dims"),
            (bad_plan("sparcas").into(), "--mass, --floor"),
            (
                SelectError::WrongModel {
                    plan_model: "a".into(),
                    plan_layers: 1,
                    model: "b".into(),
                    layers: 2,
                }
                .into(),
                "longsight plan",
            ),
            (
                CalibrateError::NoChoice { tokens: 9, block: 4, budget: 3, least: 2 }.into(),
                "at least 2, at most 2",
            ),
            (
                CalibrateError::NoChoice { tokens: 9, block: 4, budget: 3, least: 3 }.into(),
                "at least 13 for",
            ),
            (CalibrateError::TooLittleText { have: 1, tokens: 9, need: 2 }.into(), "--tokens"),
            (CalibrateError::from(bad_plan("sparcas")).into(), "--mass, --floor"),
            (BenchError::from(bad_plan("sparcas")).into(), "--mass, --floor"),
            (BenchError::from(full()).into(), "--ctx"),
            (BenchError::Select(full().into()).into(), "--ctx"),
            (CalibrateError::from(EngineError::from(full())).into(), "--ctx"),
            (
                CalibrateError::from(EngineError::BadContext { context: 9, most: 8 }).into(),
                "--ctx takes up to 8",
            ),
            (SampleError::TooFewTokens { tokens: 1, least: 2 }.into(), "--lengths"),
            (SampleError::TextTooShort { text: "a.txt".into(), have: 1, need: 2 }.into(), "--text"),
        ];
        for (e, option) in cases {
            let e = e.context("while loading");
            let sentence = format!("{e:#}");
            assert!(!sentence.contains("--") && !sentence.contains("longsight"), "{sentence}");
            let said = hint(&e, false);
            assert!(said.as_ref().is_some_and(|h| h.contains(option)), "{sentence}: {said:?}");
        }
        assert_eq!(hint(&EngineError::EmptyPrompt.into(), false), None);
        let short = CalibrateError::TooLittleText { have: 1, tokens: 9, need: 2 }.into();
        let (calibrates, trains) = (hint(&short, true).unwrap(), hint(&short, false).unwrap());
        assert!(calibrates.contains("--prompts") && !calibrates.contains("--held-out"));
        assert!(trains.contains("--held-out") && !trains.contains("--prompts"));
    }
}

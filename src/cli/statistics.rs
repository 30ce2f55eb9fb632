//! What is said of a finished answer.

use super::ui;
use crate::engine::{AuditConfig, AuditSummary, Doubling, Finish, Stats};
use crate::select::{AllDense, Plan};

/// A finished answer.
pub struct Answer {
    pub text: String,
    pub stats: Stats,
    pub audit: AuditSummary,
}

/// One line: sizes, speeds, bytes, and what the audit found.
pub fn statistics(a: &Answer, plan: &Plan) -> String {
    let (s, method) = (&a.stats, &plan.method);
    let rate = |n: usize, t: f64| if t > 0.0 { n as f64 / t } else { 0.0 };
    let reused = match s.reused_tokens {
        0 => String::new(),
        n => format!(" ({} still cached)", ui::thousands(n as u64)),
    };
    let read = s.prefill_tokens + s.reused_tokens;
    let of = match s.prompt_tokens {
        n if n > read => format!("{} of ", ui::thousands(read as u64)),
        _ => String::new(),
    };
    let mut parts = vec![
        format!(
            "{of}{} prompt tokens{reused}, {:.1} s ({:.0}/s)",
            ui::thousands(s.prompt_tokens as u64),
            s.prefill_seconds,
            rate(s.prefill_tokens, s.prefill_seconds)
        ),
        format!(
            "{} answer tokens, {:.1}/s",
            s.generated_tokens,
            rate(s.decode_steps, s.decode_seconds)
        ),
    ];
    let (kv, dense) = (ui::bytes(s.kv_bytes), ui::bytes(s.kv_bytes_dense));
    let share = 100.0 * s.kv_bytes as f64 / s.kv_bytes_dense as f64;
    // Nobody reads back how long the lists were.
    let most = if plan.reads_at_most() { "at most " } else { "" };
    match s.kv_bytes < s.kv_bytes_dense {
        // Nothing was decoded, so nothing was selected.
        _ if s.decode_steps == 0 => {}
        true => parts.push(format!(
            "{method}: {most}{kv} of KV in the last step instead of {dense} ({share:.0} %)"
        )),
        false => {
            let why = match plan.all_dense(s.prompt_tokens + s.decode_steps) {
                Some(AllDense::Length { until, options }) if method != "dense" => {
                    format!("; so it is up to {} tokens: {options}", ui::thousands(until as u64))
                }
                _ => String::new(),
            };
            // Texts only grow, so that the steps before were dense too, but for a budget that was smaller.
            let when = if a.audit.doubling.doubled > 0 { " in the last step" } else { "" };
            parts.push(format!("{method}: every token attended to{when} ({kv} of KV{why})"));
        }
    }
    if let Some((layer, worst)) = a.audit.worst_layer() {
        parts.push(format!(
            "attention mass kept {:.1} % (worst layer, {layer}: {:.1} %), output error {:.1} %, in {}",
            100.0 * a.audit.recall(),
            100.0 * worst,
            100.0 * a.audit.output_error(),
            ui::count(audited(&a.audit), "step")
        ));
    }
    parts.extend(doubling(&a.audit.doubling, plan.all_dense(s.prompt_tokens + s.decode_steps)));
    match s.finish {
        Some(Finish::Cancelled) => parts.push("interrupted".into()),
        Some(Finish::Length) => parts.push("cut at the most tokens of an answer (-n)".into()),
        Some(Finish::Context) => parts.push("cut: the context is full (--ctx)".into()),
        // The last is an error of its own.
        Some(Finish::Eos | Finish::Stop | Finish::NoFiniteLogit) | None => {}
    }
    parts.join(" | ")
}

/// Steps that were audited.
fn audited(a: &AuditSummary) -> usize {
    a.layers.iter().map(|l| l.samples).max().unwrap_or(0)
}

/// How often the budget was doubled, whether what the audit says is of the budget before, and whether it stayed too small.
/// `dense`: why nothing is left to measure.
fn doubling(d: &Doubling, dense: Option<AllDense>) -> Vec<String> {
    let times = |n| if n == 1 { "once".into() } else { format!("{n} times") };
    let mut said = Vec::new();
    match (d.doubled, d.unmeasured) {
        (0, _) => {}
        (n, true) => {
            let why = match dense {
                Some(_) => "every token is attended to since",
                None => "not measured since; --audit N measures every N steps",
            };
            said.push(format!("then the budget was doubled ({}), and {why}", times(n)));
        }
        (n, false) => {
            said.push(format!("budget doubled {} on the way, measured before and after", times(n)));
        }
    }
    if d.no_room > 0 {
        said.push(format!("the device had no room for a doubled budget ({})", times(d.no_room)));
    }
    said
}

/// Why an audit measured nothing; none where it did, or where none was asked for.
pub fn unaudited(a: &Answer, plan: &Plan, audit: Option<AuditConfig>) -> Option<String> {
    let AuditConfig { every, min_recall } = audit.filter(|_| a.audit.is_empty())?;
    let (steps, method) = (a.stats.decode_steps, &plan.method);
    let reached = a.stats.prompt_tokens + steps;
    let why = match plan.all_dense(reached) {
        _ if steps == 0 => "no token was decoded after the first".into(),
        Some(_) if method == "dense" => "dense attends to every token".into(),
        Some(AllDense::Layers) => format!("no layer of {method} is sparse (--dense-layers)"),
        Some(AllDense::Length { until, options }) => format!(
            "no step was sparse: {method} attends to every token up to {}, and prompt and answer have {} ({options})",
            ui::thousands(until as u64),
            ui::thousands(reached as u64)
        ),
        None => format!("one step in {every} is measured, none of these {steps}"),
    };
    Some(match min_recall {
        Some(share) => format!("note: --min-recall {share} found nothing to measure: {why}"),
        None => format!("note: --audit {every} measured nothing: {why}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::LayerSummary;
    use crate::select::{LayerPlan, Role};

    #[test]
    fn an_interrupted_prompt_claims_no_more_than_was_read() {
        let plan = Plan::dense(1);
        let stats = Stats {
            prompt_tokens: 3822,
            prefill_tokens: 2560,
            prefill_seconds: 10.0,
            kv_bytes: 1,
            kv_bytes_dense: 2,
            finish: Some(Finish::Cancelled),
            ..Stats::default()
        };
        let line = statistics(
            &Answer { text: String::new(), stats, audit: AuditSummary::default() },
            &plan,
        );
        let want =
            "2,560 of 3,822 prompt tokens, 10.0 s (256/s) | 0 answer tokens, 0.0/s | interrupted";
        assert_eq!(line, want);
    }

    #[test]
    fn lists_that_scores_end_read_at_most_so_much() {
        let shape = crate::select::ModelShape {
            model: "m",
            windows: &[None; 4],
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            importance: None,
        };
        let said = |name: &str| {
            let spec: crate::select::MethodSpec = name.parse().unwrap();
            let (kv_bytes, kv_bytes_dense, decode_steps) = (28_000_000, 100_000_000, 3);
            let stats = Stats { kv_bytes, kv_bytes_dense, decode_steps, ..Stats::default() };
            let answer = Answer { text: String::new(), stats, audit: AuditSummary::default() };
            statistics(&answer, &spec.plan(&shape, 8192).unwrap())
        };
        assert!(said("sparcas").contains("sparcas: 28.0 MB of KV"), "{}", said("sparcas"));
        let trimmed = said("sparcas:mass=0.9");
        assert!(trimmed.contains("sparcas: at most 28.0 MB of KV"), "{trimmed}");
    }

    #[test]
    fn a_budget_that_was_doubled_last_is_not_called_measured() {
        let layer = LayerSummary {
            layer: 2,
            samples: 1,
            recall: 0.5,
            worst_recall: 0.5,
            output_error: 0.1,
        };
        let layers = vec![LayerPlan { role: Role::Select, ..LayerPlan::dense() }];
        let sparse = Plan { layers, ..Plan::dense(1) };
        let of = |plan: &Plan, samples, doubling| {
            let layers = vec![LayerSummary { samples, ..layer.clone() }];
            let stats =
                Stats { kv_bytes: 1, kv_bytes_dense: 2, decode_steps: 99, ..Stats::default() };
            let audit = AuditSummary { layers, doubling };
            statistics(&Answer { text: String::new(), stats, audit }, plan)
        };
        let doubled = |doubled, unmeasured| Doubling { doubled, unmeasured, no_room: 0 };
        let once = of(&sparse, 1, doubled(1, true));
        assert!(once.contains("in 1 step |") && once.contains("doubled (once)"), "{once}");
        assert!(once.contains("not measured since; --audit N"), "{once}");
        // Which audits doubled it cannot be told from how many there were.
        let last = of(&sparse, 9, doubled(2, true));
        assert!(last.contains("doubled (2 times), and not measured since"), "{last}");
        let twice = of(&sparse, 4, doubled(2, false));
        assert!(twice.contains("in 4 steps |") && twice.contains("doubled 2 times on"), "{twice}");
        let all = of(&Plan::dense(1), 4, doubled(2, true));
        assert!(
            all.contains("every token is attended to since") && !all.contains("--audit"),
            "{all}"
        );
    }

    #[test]
    fn a_budget_that_found_no_room_is_said() {
        let said = |no_room| doubling(&Doubling { no_room, ..Doubling::default() }, None);
        assert_eq!(said(0), [""; 0]);
        assert_eq!(said(1), ["the device had no room for a doubled budget (once)"]);
        assert_eq!(said(2), ["the device had no room for a doubled budget (2 times)"]);
    }

    #[test]
    fn speeds_are_of_what_was_run() {
        let plan = Plan::dense(1);
        let stats = Stats {
            prompt_tokens: 1100,
            reused_tokens: 1000,
            prefill_tokens: 100,
            prefill_seconds: 2.0,
            generated_tokens: 8,
            decode_steps: 8,
            decode_seconds: 2.0,
            ..Stats::default()
        };
        let line = statistics(
            &Answer { text: String::new(), stats, audit: AuditSummary::default() },
            &plan,
        );
        assert!(
            line.starts_with(
                "1,100 prompt tokens (1,000 still cached), 2.0 s (50/s) | 8 answer tokens, 4.0/s"
            ),
            "{line}"
        );
    }

    #[test]
    fn an_audit_of_nothing_says_why() {
        let plan = |name: &str| {
            let spec: crate::select::MethodSpec = name.parse().unwrap();
            let model = crate::select::ModelShape {
                model: "m",
                windows: &[None; 4],
                heads: 4,
                kv_heads: 2,
                head_dim: 64,
                importance: None,
            };
            spec.plan(&model, 8192).unwrap()
        };
        let said = |name: &str, prompt_tokens: usize, decode_steps: usize| {
            let stats = Stats { prompt_tokens, decode_steps, ..Stats::default() };
            let answer = Answer { text: String::new(), stats, audit: AuditSummary::default() };
            let audit = Some(AuditConfig::every(4));
            assert_eq!(unaudited(&answer, &plan(name), None), None);
            let recall = AuditConfig { every: 32, min_recall: Some(0.9) };
            let said = unaudited(&answer, &plan(name), Some(recall)).unwrap();
            assert!(said.contains("--min-recall 0.9") && !said.contains("--audit"), "{said}");
            unaudited(&answer, &plan(name), audit).unwrap()
        };
        let cases = [
            ("dense", 9000, 9, "dense attends to every token"),
            ("sparcas:dense-layers=4", 9000, 9, "no layer of sparcas is sparse (--dense-layers)"),
            ("sparcas", 9000, 0, "no token was decoded"),
            (
                "sparcas",
                100,
                9,
                "up to 2,048, and prompt and answer have 109 (--dense-below and --budget)",
            ),
            ("sparcas", 1000, 9, "(--dense-below)"),
            (
                "sparcas:dense-below=0",
                100,
                9,
                "up to 512, and prompt and answer have 109 (--budget)",
            ),
            ("sparcas", 9000, 3, "one step in 4 is measured, none of these 3"),
        ];
        for (name, prompt, steps, why) in cases {
            let said = said(name, prompt, steps);
            assert!(said.starts_with("note: --audit 4 measured nothing: "), "{said}");
            assert!(said.contains(why), "{said}");
        }
    }
}

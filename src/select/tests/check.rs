//! Plans that cannot run are refused with the reason.

use super::*;
use crate::backend::HeadPool;
use crate::select::Budget;

fn select(pool: HeadPool) -> LayerPlan {
    LayerPlan {
        role: Role::Select,
        scorer: Scorer::Exact,
        pool,
        budget: Budget::fixed(64, 0),
        keep: Keep { sinks: 4, recent: 32 },
        ..LayerPlan::dense()
    }
}

/// Layer 0 dense, an anchor, and a layer that reuses it; 4 query heads over 2.
fn reusing(edit: impl FnOnce(&mut LayerPlan)) -> Plan {
    let anchor = select(HeadPool::MeanSoftmax);
    let role = Role::Reuse { from: 1, head_map: vec![1, 1], refine: None };
    let mut reuse = LayerPlan { role, scorer: Scorer::None, ..anchor.clone() };
    edit(&mut reuse);
    Plan {
        method: "m".into(),
        model: String::new(),
        context: 0,
        layers: vec![LayerPlan::dense(), anchor, reuse],
    }
}

fn check(plan: &Plan, windows: &[Option<usize>]) -> Result<(), SelectError> {
    plan.check(&ModelShape {
        model: "",
        windows,
        heads: 4,
        kv_heads: 2,
        head_dim: 24,
        importance: None,
    })
}

fn reason(plan: &Plan, window: Option<usize>) -> String {
    let mut windows = vec![None; plan.layers.len()];
    windows[plan.layers.len() - 1] = window;
    check(plan, &windows).unwrap_err().to_string()
}

#[test]
fn a_layer_that_cannot_run_is_refused() {
    let layer = select(HeadPool::SumLogit);
    let plan = |l: LayerPlan| Plan {
        method: "m".into(),
        model: String::new(),
        context: 0,
        layers: vec![l],
    };
    check(&plan(layer.clone()), &[None]).unwrap();
    assert!(reason(&plan(layer.clone()), Some(128)).contains("last 128"));
    check(&plan(LayerPlan::dense()), &[Some(128)]).unwrap();
    let pooled = LayerPlan { scorer: Scorer::None, ..select(HeadPool::MaxSoftmax) };
    assert!(reason(&plan(pooled), None).contains("pools scores"));
    let keep = Keep { sinks: usize::MAX, recent: 2 };
    let wide = LayerPlan { keep, ..layer.clone() };
    assert!(reason(&plan(wide), None).contains("do not fit a budget"));
    // A share may leave fewer tokens than the room of a list.
    let share = Some(crate::backend::Share { permille: 100, at_least: 20 });
    let shared = LayerPlan { budget: Budget { share, ..layer.budget }, ..layer.clone() };
    assert!(reason(&plan(shared), None).contains("budget of 20"));
    // 24 dimensions are no multiple of 16, though 16 of them are.
    let refresh = Refresh::Every { every: 1, phase: 0 };
    let metric = DimMetric::AbsQ;
    let scorer = Scorer::Dims { dims: 16, metric, unit: 16, refresh, slice: false };
    assert!(reason(&plan(LayerPlan { scorer, ..layer }), None).contains("unit 16"));
}

#[test]
fn corrections_and_budgets_by_scores_need_scores_of_tokens() {
    let layer = LayerPlan { correct: true, ..select(HeadPool::SumLogit) };
    let plan = |l: LayerPlan| Plan {
        method: "m".into(),
        model: String::new(),
        context: 0,
        layers: vec![l],
    };
    check(&plan(layer.clone()), &[None]).unwrap();
    for scorer in [Scorer::None, Scorer::Random { seed: 1 }] {
        let blind = LayerPlan { scorer, ..layer.clone() };
        assert!(reason(&plan(blind), None).contains("scored one by one"));
    }
    let anchor = LayerPlan { role: Role::DenseAnchor, ..layer.clone() };
    assert!(reason(&plan(anchor), None).contains("scored one by one"));
    let following = |follow| {
        let budget = Budget { follow: Some(follow), ..layer.budget };
        LayerPlan { budget, ..layer.clone() }
    };
    let mass = |permille| following(Follow::Mass { permille, at_least: 1 });
    let shared = |mean, at_least| following(Follow::Shared { mean, at_least });
    check(&plan(mass(850)), &[None]).unwrap();
    check(&plan(shared(40, 8)), &[None]).unwrap();
    assert!(reason(&plan(mass(0)), None).contains("0 thousandths"));
    assert!(reason(&plan(shared(65, 8)), None).contains("65 on average"));
    assert!(reason(&plan(shared(40, 41)), None).contains("41 tokens at least"));
    // 4 sinks and 32 recent tokens are part of what is shared.
    assert!(reason(&plan(shared(35, 8)), None).contains("budget of 35"));
    let anchor = LayerPlan { role: Role::DenseAnchor, correct: false, ..mass(850) };
    assert!(reason(&plan(anchor), None).contains("follows scores"));
    let budget = mass(850).budget;
    assert_eq!((budget.dense_until(), budget.tokens_at(1000)), (64, 64));
    let budget = shared(40, 8).budget;
    assert_eq!((budget.dense_until(), budget.tokens_at(1000)), (40, 40));
}

#[test]
fn layers_that_reuse_tokens_fit_their_anchor() {
    check(&reusing(|_| ()), &[None; 3]).unwrap();
    fn role(from: usize, head_map: &[u8]) -> Role {
        Role::Reuse { from, head_map: head_map.to_vec(), refine: None }
    }
    let wrong = |edit: fn(&mut LayerPlan), window| reason(&reusing(edit), window);
    assert!(wrong(|_| (), Some(64)).contains("last 64"));
    assert!(wrong(|l| l.role = role(0, &[0, 1]), None).contains("no earlier layer that selects"));
    assert!(wrong(|l| l.role = role(2, &[0, 1]), None).contains("no earlier layer that selects"));
    assert!(wrong(|l| l.role = role(9, &[0, 1]), None).contains("no earlier layer that selects"));
    assert!(wrong(|l| l.role = role(1, &[0]), None).contains("1 entries for 2 KV heads"));
    assert!(wrong(|l| l.role = role(1, &[0, 2]), None).contains("names list 2"));
    assert!(wrong(|l| l.budget.dense_below = 100, None).contains("dense up to 100 tokens"));
    assert!(wrong(|l| l.scorer = Scorer::Exact, None).contains("a scorer of its own"));
    let other = |l: &mut LayerPlan| l.budget = Budget::fixed(63, 64);
    assert!(wrong(other, None).contains("must have its budget"));
}

#[test]
fn refining_layers_fit_what_they_are_handed() {
    let refine = |candidates, scorer, edit: fn(&mut LayerPlan)| {
        reusing(|l| {
            let refine = Some(Refine { candidates, scorer });
            l.role = Role::Reuse { from: 1, head_map: vec![0, 1], refine };
            edit(l);
        })
    };
    let sorted = Scorer::Sorted { dims: 8, int8: false };
    let good = refine(128, sorted.clone(), |l| l.budget.tokens = 64);
    check(&good, &[None; 3]).unwrap();
    let same = |_: &mut LayerPlan| ();
    assert!(reason(&refine(64, Scorer::Exact, same), None).contains("64 candidates"));
    assert!(reason(&refine(128, Scorer::None, same), None).contains("scored exactly"));
    let int8 = Scorer::Sorted { dims: 8, int8: true };
    assert!(reason(&refine(128, int8, same), None).contains("scored exactly"));
    let odd = Scorer::Sorted { dims: 12, int8: false };
    assert!(reason(&refine(128, odd, same), None).contains("12 key dimensions"));
    let keeps = refine(128, Scorer::Exact, |l| l.keep.recent = 33);
    assert!(reason(&keeps, None).contains("than layer 1 hands down"));
    let one = refine(128, Scorer::Exact, |l| l.pool = HeadPool::AllSoftmax);
    assert!(reason(&one, None).contains("one list for all heads"));
    let mut custom = good.clone();
    custom.layers[1].scorer = Scorer::Custom { name: "mine".into() };
    assert!(reason(&custom, None).contains("no built-in scores"));
    let mut two = good;
    two.layers.push(refine(256, sorted, same).layers.remove(2));
    assert!(reason(&two, None).contains("different numbers of candidates"));
}

/// Plans that were saved before there were shares, anchors and refined lists.
#[test]
fn older_plans_still_parse() {
    let json = r#"{"method":"m","model":"","layers":[{"role":"dense","scorer":{"kind":"none"},"pool":"sum_logit",
        "scale":"inv_sqrt_dim","budget":{"tokens":0,"dense_below":0},"keep":{"sinks":0,"recent":1}},
        {"role":"select","scorer":{"kind":"exact"},"pool":"max_softmax","scale":"inv_sqrt_dim",
        "budget":{"tokens":64,"dense_below":0},"keep":{"sinks":4,"recent":32}}]}"#;
    let plan: Plan = serde_json::from_str(json).unwrap();
    assert_eq!(plan.layers[1], select(HeadPool::MaxSoftmax));
    let reuse = reusing(|_| ());
    let json = serde_json::to_string(&reuse).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), reuse);
    let short = r#"{"reuse":{"from":1,"head_map":[1,1]}}"#;
    assert_eq!(serde_json::from_str::<Role>(short).unwrap(), reuse.layers[2].role);
}

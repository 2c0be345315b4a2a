//! The numbers of the `accuracy` example against values worked out by hand, and its tales against
//! `scripts/tales.py`.

#[path = "../examples/accuracy/metrics.rs"]
#[allow(dead_code)]
mod metrics;
#[path = "../examples/accuracy/tales.rs"]
#[allow(dead_code)]
mod tales;

use std::collections::HashSet;

use metrics::{Distribution, Position, Summary, first_divergence, quantile, standard_error};
use tales::Teller;

/// What f64 arithmetic on f32 logits of moderate size may lose.
const ROUNDING: f64 = 1e-6;

fn assert_close(got: f64, expected: f64) {
    assert!((got - expected).abs() <= ROUNDING * expected.abs().max(1.0), "{got} is not {expected}");
}

/// Logits of these probabilities, shifted: a softmax does not see it.
fn logits(probabilities: &[f64], shift: f64) -> Vec<f32> {
    probabilities.iter().map(|p| (p.ln() + shift) as f32).collect()
}

fn position(p: &[f32], q: &[f32], next: usize) -> Position {
    Position::new(Distribution::new(p), Distribution::new(q), next)
}

#[test]
fn kl_of_known_distributions() {
    // 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4) = 1/2 ln 2 + 1/2 ln 2/3
    let expected = 0.5 * 2f64.ln() + 0.5 * (2.0f64 / 3.0).ln();
    for shift in [0.0, -30.0, 5.0] {
        let got = position(&logits(&[0.5, 0.5], 0.0), &logits(&[0.25, 0.75], shift), 1);
        assert_close(got.kl, expected);
        assert_close(got.nll, -(0.75f64.ln()));
        assert_close(got.reference_nll, 2f64.ln());
    }
    // Certain against even: ln 4. What has no probability adds nothing.
    let certain = [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY];
    assert_close(position(&certain, &[7.0; 4], 0).kl, 4f64.ln());
    // The other way round: a token that is possible was ruled out.
    assert_eq!(position(&[7.0; 4], &certain, 0).kl, f64::INFINITY);
    // The same logits are at distance 0, exactly.
    let same = logits(&[0.1, 0.2, 0.7], 3.0);
    assert_eq!(position(&same, &same, 0).kl, 0.0);
    // Logits far apart do not overflow.
    assert_close(position(&[300.0, -300.0], &[300.0, -300.0], 0).nll, 0.0);
}

#[test]
fn agreement_is_about_the_likeliest_token() {
    let agrees = |p: &[f32], q: &[f32]| position(p, q, 0).agrees;
    assert!(agrees(&[1.0, 2.0, 0.0], &[0.0, 0.1, 0.0]));
    assert!(!agrees(&[1.0, 2.0, 0.0], &[0.2, 0.1, 0.0]));
    // Of equals the lowest.
    assert!(agrees(&[2.0, 2.0, 0.0], &[1.0, 0.5, 0.5]));
    assert_eq!(metrics::greedy(&[f32::NAN, -1.0, 3.0, 3.0]), Some(2));
    assert_eq!(metrics::greedy(&[f32::NAN, f32::NEG_INFINITY]), None);
}

#[test]
fn what_is_no_distribution_is_infinitely_far() {
    for bad in [[0.0, f32::NAN, 1.0], [0.0, f32::INFINITY, 1.0], [f32::NEG_INFINITY; 3], [f32::NAN; 3]] {
        let got = position(&[0.0, 1.0, 0.0], &bad, 1);
        assert!(!got.is_valid && !got.agrees, "{bad:?}");
        assert_eq!((got.kl, got.nll), (f64::INFINITY, f64::INFINITY), "{bad:?}");
        assert_close(got.reference_nll, (2.0 + 1f64.exp()).ln() - 1.0);
    }
    let good = position(&[0.0, 1.0], &[0.0, 1.0], 1);
    let bad = position(&[0.0, 1.0], &[f32::NAN, 1.0], 1);
    let summary = Summary::new(&[vec![good, good], vec![good, bad]]);
    assert_eq!((summary.positions, summary.invalid, summary.top1), (4, 1, 0.75));
    assert!(summary.mean_kl.is_infinite() && summary.perplexity.is_infinite() && summary.p99_kl.is_infinite());
    assert!(summary.reference_perplexity.is_finite());
}

#[test]
fn summaries_of_known_positions() {
    let with = |kl: f64, p_next: f64| Position {
        kl,
        nll: -p_next.ln(),
        reference_nll: 2f64.ln(),
        agrees: kl < 0.5,
        is_valid: true,
    };
    // exp((ln 2 + ln 8) / 2) = 4; text means of KL are 0.1 and 0.5: error sqrt(0.08 / 2) = 0.2.
    let summary = Summary::new(&[vec![with(0.1, 0.5), with(0.1, 0.125)], vec![with(0.2, 0.5), with(0.8, 0.125)]]);
    assert_close(summary.perplexity, 4.0);
    assert_close(summary.reference_perplexity, 2.0);
    assert_close(summary.mean_kl, 0.3);
    assert_close(summary.kl_error, 0.2);
    assert_eq!((summary.p99_kl, summary.max_kl, summary.top1, summary.positions), (0.8, 0.8, 0.75, 4));
    assert!(standard_error(&[1.0]).is_nan(), "one text says nothing of its error");
    assert_close(standard_error(&[1.0, 2.0, 3.0]), 1.0 / 3f64.sqrt());
}

#[test]
fn p99_is_the_nearest_rank() {
    let values = |count: usize| (1..=count).map(|value| value as f64).collect::<Vec<_>>();
    for (count, expected) in [(1, 1.0), (10, 10.0), (99, 99.0), (100, 99.0), (101, 100.0), (200, 198.0), (1000, 990.0)]
    {
        assert_eq!(quantile(&values(count), 0.99), expected, "of {count}");
    }
    assert_eq!(quantile(&values(7), 1.0), 7.0);
}

#[test]
fn divergence_is_the_first_token_that_differs() {
    assert_eq!(first_divergence(&[1, 2, 3], &[1, 2, 3]), None);
    assert_eq!(first_divergence(&[1, 2, 3], &[1, 9, 3]), Some(1));
    assert_eq!(first_divergence(&[1, 2], &[1, 2, 3]), Some(2));
    assert_eq!(first_divergence(&[], &[1]), Some(0));
}

#[test]
fn tales_are_those_of_the_script() {
    let script = include_str!("../scripts/tales.py");
    let lists = [
        ("NAMES", tales::NAMES),
        ("THINGS", tales::THINGS),
        ("MATERIALS", tales::MATERIALS),
        ("PLACES", tales::PLACES),
        ("PLACE_ADJECTIVES", tales::PLACE_ADJECTIVES),
        ("FOODS", tales::FOODS),
        ("WEATHERS", tales::WEATHERS),
        ("ANIMAL_ADJECTIVES", tales::ANIMAL_ADJECTIVES),
    ];
    for (name, words) in lists {
        assert!(script.contains(&format!("\n{name} = \"{words}\".split()\n")), "{name}");
    }
    assert!(script.contains(&format!("\nVERBS = [{}]\n", tales::VERBS.map(|verb| format!("{verb:?}")).join(", "))));
    assert!(script.contains(&format!("\nFACT = {:?}\n", tales::FACT)));
    assert!(script.contains(&format!("\nQUESTION = {:?}\n", tales::QUESTION)));
    let fillers = tales::FILLERS.map(|filler| format!("    {filler:?},\n")).concat();
    assert!(script.contains(&format!("\nFILLERS = [\n{fillers}]\n")));
    assert_eq!(tales::THINGS.split(' ').count(), tales::MAX_FACTS);
}

#[test]
fn a_tale_states_what_it_asks() {
    let mut teller = Teller::new(7, 0);
    for (facts, fillers) in [(1, 0), (4, 20), (tales::MAX_FACTS, 3)] {
        let tale = teller.tale(facts, fillers);
        assert_eq!(tale.questions.len(), facts);
        assert_eq!(tale.text.matches('.').count(), facts + fillers, "{}", tale.text);
        assert!(!tale.text.contains(['{', '}']), "{}", tale.text);
        let questions: HashSet<&String> = tale.questions.iter().map(|(question, _)| question).collect();
        assert_eq!(questions.len(), facts, "every question has one answer");
        for (question, answer) in &tale.questions {
            assert_eq!(tale.text.matches(answer.as_str()).count(), 1);
            let owner = question.strip_prefix("Where is ").unwrap().split('\'').next().unwrap();
            assert!(answer.starts_with(&format!("{owner}'s ")), "{question} {answer}");
        }
        let (prompt, answer) = tale.recall_case();
        assert_eq!(prompt, format!("{} {}", tale.text, tale.questions[0].0));
        assert_eq!(answer, tale.questions[0].1);
        assert!(tale.document().starts_with(&tale.text) && tale.document().ends_with(".\n"));
    }
    let text = |seed, stream| Teller::new(seed, stream).tale(4, 4).text;
    assert_eq!(text(1, 2), text(1, 2));
    assert!(text(1, 2) != text(1, 3) && text(1, 2) != text(2, 2));
}

#[test]
fn an_answer_is_right_word_for_word() {
    let answer = "Tom's silver coin is in the quiet garden.";
    for (text, right) in [
        (" Tom's silver coin is in the quiet garden.", true),
        (" Tom's silver coin is in the quiet garden. Where is", true),
        ("Tom's silver coin is in the quiet garden.", false),
        (" Tom's silver coin is in the quiet garden", false),
        (" Tom's silver coin is in the dark garden.", false),
        (" Tom's silver coin is. in the quiet garden.", false),
        ("", false),
    ] {
        assert_eq!(tales::recalls(text, answer), right, "{text:?}");
    }
}

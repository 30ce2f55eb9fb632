//! Questions about a generated encyclopaedia: one entry answers, or two have to be joined.

use crate::eval::Check;
use crate::eval::draft::{Draft, Piece, Question};
use crate::eval::words::{different, pick, shuffle};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

const FIRST: &[&str] = &[
    "Adela", "Bertram", "Clara", "Dorian", "Edith", "Felix", "Greta", "Hugo", "Ida", "Julian",
    "Klara", "Leopold", "Mina", "Nestor", "Olga", "Piers", "Quentin", "Rosa", "Silas", "Thea",
];
const FAMILY: &[&str] = &[
    "Abernathy",
    "Brackwell",
    "Castellan",
    "Dunmore",
    "Ellingham",
    "Fairweather",
    "Grantley",
    "Holloway",
    "Inverness",
    "Jessop",
    "Kettering",
    "Lockhart",
    "Merriweather",
    "Northcote",
    "Oakhurst",
    "Pemberley",
    "Quillfeather",
    "Ravenscroft",
    "Stonebridge",
    "Thornbury",
];
const START: &[&str] =
    &["Al", "Bran", "Cor", "Dun", "El", "Fen", "Gar", "Hol", "Ister", "Jun", "Kel", "Lor", "Mar"];
const END: &[&str] = &["burg", "dale", "field", "ford", "ham", "haven", "mouth", "stead", "wick"];
const TRADES: &[&str] = &[
    "an architect",
    "a botanist",
    "a cartographer",
    "a clockmaker",
    "a composer",
    "an engraver",
    "a geologist",
    "a historian",
    "a linguist",
    "a painter",
    "a physician",
    "a surveyor",
];
const RIVERS: &[&str] =
    &["Amber", "Black", "Clear", "Deep", "Elder", "Flint", "Grey", "Heron", "Iron", "Jade"];

struct Person {
    name: String,
    trade: &'static str,
    town: usize,
    year: u32,
    work: String,
}

struct World {
    people: Vec<Person>,
    towns: Vec<String>,
    rivers: Vec<String>,
}

impl World {
    fn new(rng: &mut ChaCha8Rng, people: usize) -> World {
        let full = |r: &mut ChaCha8Rng| format!("{} {}", pick(r, FIRST), pick(r, FAMILY));
        let towns =
            different(rng, people / 3 + 2, |r| format!("{}{}", pick(r, START), pick(r, END)));
        let rivers: Vec<String> =
            towns.iter().map(|_| format!("{} River", pick(rng, RIVERS))).collect();
        let names = different(rng, people, full);
        let people = names.into_iter().map(|name| Person {
            name,
            trade: pick::<&str>(rng, TRADES),
            town: rng.random_range(0..towns.len()),
            year: rng.random_range(1701..1899),
            work: format!("The {} of {}", pick(rng, FAMILY), pick(rng, RIVERS)),
        });
        World { people: people.collect(), towns, rivers }
    }

    fn person(&self, p: &Person) -> String {
        let Person { name, trade, town, year, work } = p;
        let town = &self.towns[*town];
        format!(
            "{name} was {trade} who was born in {town} in {year}. After years of travel {name} settled down to \
             write. The best known book is called {work}.\n"
        )
    }

    fn town(&self, at: usize) -> String {
        let (town, river) = (&self.towns[at], &self.rivers[at]);
        format!(
            "{town} is a town with an old market. It lies on the {river}, which floods in spring.\n"
        )
    }
}

fn draft(
    rng: &mut ChaCha8Rng,
    mut entries: Vec<(String, bool)>,
    question: String,
    reference: String,
) -> Draft {
    shuffle(rng, &mut entries);
    let pieces = entries.into_iter().enumerate().map(|(i, (text, needed))| {
        let text = format!("Document {}:\n{text}\n", i + 1);
        if needed { Piece::needed(text) } else { Piece::filler(text) }
    });
    Draft {
        head: "Answer the question based on the given documents. Only give me the answer and do not output any \
               other words.\n\nThe following are given documents.\n\n"
            .into(),
        pieces: pieces.collect(),
        questions: vec![Question {
            text: format!("\nQuestion: {question}"),
            prefix: " Answer:".into(),
            check: Check::Any(vec![reference]),
        }],
    }
}

/// Entries have at least 40 tokens.
fn people(tokens: usize) -> usize {
    tokens / 40 + 3
}

pub(super) fn one_hop(rng: &mut ChaCha8Rng, tokens: usize) -> Draft {
    let world = World::new(rng, people(tokens));
    let asked = rng.random_range(0..world.people.len());
    let p = &world.people[asked];
    let (question, reference) = match rng.random_range(0..3) {
        0 => (format!("In which town was {} born?", p.name), world.towns[p.town].clone()),
        1 => (format!("In which year was {} born?", p.name), p.year.to_string()),
        _ => (format!("What is the best known book of {} called?", p.name), p.work.clone()),
    };
    let entries = world.people.iter().enumerate().map(|(i, p)| (world.person(p), i == asked));
    draft(rng, entries.collect(), question, reference)
}

pub(super) fn two_hops(rng: &mut ChaCha8Rng, tokens: usize) -> Draft {
    let world = World::new(rng, people(tokens));
    let asked = rng.random_range(0..world.people.len());
    let town = world.people[asked].town;
    let question =
        format!("On which river lies the town where {} was born?", world.people[asked].name);
    let people = world.people.iter().enumerate().map(|(i, p)| (world.person(p), i == asked));
    let towns = (0..world.towns.len()).map(|t| (world.town(t), t == town));
    let entries = people.chain(towns).collect();
    draft(rng, entries, question, world.rivers[town].clone())
}

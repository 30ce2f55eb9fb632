//! Stop strings in a stream of text pieces.

/// Passes text through until a stop string appears; holds back what may be the start of one.
#[derive(Debug, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// Empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        StopFilter { stops, held: String::new() }
    }

    /// Adds a piece; returns the text that may be shown, and whether a stop string ended it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let starts_a_stop = |&at: &usize| {
            self.held.is_char_boundary(at)
                && self.stops.iter().any(|s| s.starts_with(&self.held[at..]))
        };
        let keep = (0..self.held.len()).find(starts_a_stop).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_across_pieces_is_cut() {
        let mut f = StopFilter::new(&["\nUser:".into()]);
        assert_eq!(f.push("Paris.\nUs"), ("Paris.".into(), false));
        assert_eq!(f.push("er: no"), (String::new(), true));
    }

    #[test]
    fn a_false_start_is_released() {
        let mut f = StopFilter::new(&["END".into()]);
        assert_eq!(f.push("an E"), ("an ".into(), false));
        assert_eq!(f.push("N "), ("EN ".into(), false));
        assert_eq!(f.push("E"), (String::new(), false));
        assert_eq!(f.finish(), "E");
    }

    #[test]
    fn without_stops_everything_passes() {
        assert_eq!(StopFilter::new(&[String::new()]).push("x"), ("x".into(), false));
    }
}

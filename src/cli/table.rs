//! Aligned text tables.

/// Each value once, in the order of first appearance.
pub fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    values.fold(Vec::new(), |mut all, v| {
        if !all.contains(&v) {
            all.push(v);
        }
        all
    })
}

/// A table whose columns are as wide as their widest cell.
#[derive(Debug)]
pub struct Table {
    title: Option<String>,
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

#[derive(Debug)]
struct Column {
    name: String,
    right: bool,
}

impl Table {
    /// Names of columns; those that start with `>` are aligned to the right.
    pub fn new(names: &[&str]) -> Table {
        let column = |n: &&str| match n.strip_prefix('>') {
            Some(name) => Column { name: name.into(), right: true },
            None => Column { name: (*n).into(), right: false },
        };
        Table { title: None, columns: names.iter().map(column).collect(), rows: Vec::new() }
    }

    /// With a line above.
    pub fn titled(mut self, title: &str) -> Table {
        self.title = Some(title.into());
        self
    }

    /// Adds a line; missing cells stay empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut row: Vec<String> = cells.into_iter().collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }
}

impl Table {
    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            cells.fold("|".to_string(), |text, cell| {
                format!("{text} {} |", cell.replace('|', "\\|"))
            })
        };
        let names = line(&mut self.columns.iter().map(|c| c.name.as_str()));
        let rules = line(&mut self.columns.iter().map(|c| if c.right { "---:" } else { "---" }));
        let rows = self.rows.iter().map(|r| line(&mut r.iter().map(String::as_str)));
        let title = self.title.iter().map(|t| format!("{t}\n"));
        title.chain([names, rules]).chain(rows).map(|l| l + "\n").collect()
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(title) = &self.title {
            writeln!(f, "{title}")?;
        }
        let width = |i: usize| {
            let cells = self.rows.iter().map(|r| r[i].chars().count());
            cells.chain([self.columns[i].name.chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for ((cell, column), w) in cells.zip(&self.columns).zip(&widths) {
                if !text.is_empty() {
                    text.push_str("  ");
                }
                text.push_str(&match column.right {
                    true => format!("{cell:>w$}"),
                    false => format!("{cell:<w$}"),
                });
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.columns.iter().map(|c| c.name.as_str()))?;
        let rules: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
        line(&mut rules.iter().map(String::as_str))?;
        self.rows.iter().try_for_each(|r| line(&mut r.iter().map(String::as_str)))
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_line_up() {
        let mut t = Table::new(&["test", ">t/s"]);
        t.row(["pp512".to_owned(), "1234.5".to_owned()]);
        t.row(["tg8".to_owned()]);
        assert_eq!(t.to_string(), "test      t/s\n-----  ------\npp512  1234.5\ntg8\n");
        assert_eq!(
            t.markdown(),
            "| test | t/s |\n| --- | ---: |\n| pp512 | 1234.5 |\n| tg8 |  |\n"
        );
    }
}

//! Plain text tables.

/// Columns of text, as wide as they must be, two blanks apart; a line of titles above.
pub struct Table {
    titles: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

impl Table {
    pub fn new<const N: usize>(titles: [(&'static str, Align); N]) -> Table {
        Table { titles: titles.into(), rows: Vec::new() }
    }

    /// # Panics
    /// When `row` has not as many cells as there are titles.
    pub fn row<const N: usize>(&mut self, row: [String; N]) {
        assert_eq!(N, self.titles.len());
        // A name from elsewhere must not be able to draw on the terminal.
        self.rows.push(row.into_iter().map(|cell| printable(&cell)).collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// `text` with everything that could steer a terminal replaced.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let length = |text: &str| text.chars().count();
        let widths: Vec<usize> = (0..self.titles.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| length(&row[column]));
                cells.chain([length(self.titles[column].0)]).max().unwrap_or(0)
            })
            .collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for ((cell, (_, align)), width) in cells.zip(&self.titles).zip(&widths) {
                let blanks = " ".repeat(width - length(cell));
                match align {
                    Align::Left => text.extend([cell, &blanks]),
                    Align::Right => text.extend([&blanks, cell]),
                }
                text.push_str("  ");
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.titles.iter().map(|(title, _)| *title))?;
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new([("NAME", Align::Left), ("N", Align::Right), ("END", Align::Left)]);
        table.row(["a".into(), "1".into(), "x".into()]);
        table.row(["größer".into(), "100".into(), "\x1b[31m".into()]);
        assert_eq!(table.to_string(), "NAME      N  END\na         1  x\ngrößer  100  ?[31m\n");
    }
}

//! Rows of measurements, as a table for people and JSON for programs.

use serde_json::{Value, json};

/// What a number should be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Goal {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
    /// It is only told.
    None,
}

/// Whether a goal was reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Reached,
    Missed,
    NoGoal,
}

/// One measurement.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Lodge's number.
    pub value: f64,
    /// Its unit: `s`, `MiB`, `x`.
    pub unit: &'static str,
    /// What it is held against, and that one's number in the same unit.
    pub against: Option<(&'static str, f64)>,
    /// What the ratio should be; without something to hold it against, what the value should be.
    pub goal: Goal,
}

impl Row {
    /// Lodge's number over the other's.
    pub fn ratio(&self) -> Option<f64> {
        self.against.map(|(_, other)| self.value / other)
    }

    /// Whether the goal was reached.
    pub fn verdict(&self) -> Verdict {
        let number = self.ratio().unwrap_or(self.value);
        let reached = match self.goal {
            Goal::None => return Verdict::NoGoal,
            Goal::AtMost(most) => number <= most,
            Goal::AtLeast(least) => number >= least,
        };
        if reached { Verdict::Reached } else { Verdict::Missed }
    }
}

/// The rows as aligned lines.
pub fn text(rows: &[Row]) -> String {
    let mut lines = vec![["what", "lodge", "against", "ratio", "goal", ""].map(str::to_owned)];
    for row in rows {
        let number = |value: f64| format!("{value:.3} {}", row.unit);
        lines.push([
            row.name.clone(),
            number(row.value),
            row.against
                .map_or_else(String::new, |(name, value)| format!("{name} {}", number(value))),
            row.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            match row.goal {
                Goal::AtMost(most) => format!("<= {most}"),
                Goal::AtLeast(least) => format!(">= {least}"),
                Goal::None => String::new(),
            },
            match row.verdict() {
                Verdict::Reached => "ok".into(),
                Verdict::Missed => "MISSED".into(),
                Verdict::NoGoal => String::new(),
            },
        ]);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |cells: &[String; 6]| {
        let cells = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    lines.iter().map(line).collect()
}

/// The rows as JSON.
pub fn json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        let goal = match row.goal {
            Goal::AtMost(most) => json!({ "at_most": most }),
            Goal::AtLeast(least) => json!({ "at_least": least }),
            Goal::None => Value::Null,
        };
        json!({
            "name": row.name,
            "value": row.value,
            "unit": row.unit,
            "against": row.against.map(|(name, value)| json!({ "name": name, "value": value })),
            "ratio": row.ratio(),
            "goal": goal,
            "reached": match row.verdict() {
                Verdict::Reached => Value::Bool(true),
                Verdict::Missed => Value::Bool(false),
                Verdict::NoGoal => Value::Null,
            },
        })
    };
    json!({ "rows": rows.iter().map(row).collect::<Vec<_>>() })
}

/// The geometric mean; 0 of none.
pub fn geometric_mean(numbers: &[f64]) -> f64 {
    let logs: f64 = numbers.iter().map(|number| number.ln()).sum();
    if numbers.is_empty() { 0.0 } else { (logs / numbers.len() as f64).exp() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: f64, against: Option<f64>, goal: Goal) -> Row {
        let against = against.map(|value| ("QEMU", value));
        Row { name: "boot".into(), value, unit: "s", against, goal }
    }

    #[test]
    fn goals_are_for_the_ratio_where_there_is_one() {
        assert_eq!(row(6.0, Some(2.0), Goal::AtMost(4.0)).verdict(), Verdict::Reached);
        assert_eq!(row(9.0, Some(2.0), Goal::AtMost(4.0)).verdict(), Verdict::Missed);
        assert_eq!(row(9.0, None, Goal::AtLeast(8.0)).verdict(), Verdict::Reached);
        assert_eq!(row(9.0, None, Goal::None).verdict(), Verdict::NoGoal);
    }

    #[test]
    fn the_table_and_the_json_say_the_same() {
        let rows = [row(6.0, Some(2.0), Goal::AtMost(4.0)), row(9.0, None, Goal::AtMost(1.0))];
        let expected = "\
what  lodge    against       ratio  goal
boot  6.000 s  QEMU 2.000 s  3.00   <= 4  ok
boot  9.000 s                       <= 1  MISSED
";
        assert_eq!(text(&rows), expected);
        let json = json(&rows);
        assert_eq!(json["rows"][0]["ratio"], 3.0);
        assert_eq!(json["rows"][1]["reached"], false);
    }

    #[test]
    fn means() {
        assert!((geometric_mean(&[1.0, 4.0, 16.0]) - 4.0).abs() < 1e-9);
        assert_eq!(geometric_mean(&[]), 0.0);
    }
}

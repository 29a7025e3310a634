//! The pieces of Python that chat templates call: `json.dumps` and `strftime`.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// How `json.dumps` writes. The defaults are those of transformers' `tojson` filter.
pub(super) struct DumpStyle {
    /// Spaces for each level; everything on one line if `None`.
    pub indent: Option<usize>,
    /// Between items.
    pub item_separator: String,
    /// Between a key and its value.
    pub key_separator: String,
    /// Whether keys are sorted.
    pub sort_keys: bool,
    /// Whether characters outside ASCII are written as escapes.
    pub ensure_ascii: bool,
}

impl Default for DumpStyle {
    fn default() -> Self {
        Self {
            indent: None,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
            sort_keys: false,
            ensure_ascii: false,
        }
    }
}

/// Writes JSON as Python's `json.dumps` does.
pub(super) fn json_dumps(value: &Value, style: &DumpStyle) -> String {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &DumpStyle, level: usize) {
    match value {
        Value::String(text) => write_string(out, text, style),
        Value::Array(items) => {
            write_items(out, ['[', ']'], items.iter(), style, level, |out, item| {
                write_value(out, item, style, level + 1);
            });
        }
        Value::Object(entries) => {
            let mut entries: Vec<_> = entries.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| *key);
            }
            write_items(out, ['{', '}'], entries.into_iter(), style, level, |out, (key, item)| {
                write_string(out, key, style);
                out.push_str(&style.key_separator);
                write_value(out, item, style, level + 1);
            });
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn write_items<T>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl ExactSizeIterator<Item = T>,
    style: &DumpStyle,
    level: usize,
    write_item: impl Fn(&mut String, T),
) {
    let is_empty = items.len() == 0;
    out.push(open);
    for (index, item) in items.enumerate() {
        if index > 0 {
            // With an indent, Python's default separator loses its trailing space.
            let separator = &style.item_separator;
            out.push_str(if style.indent.is_some() { separator.trim_end() } else { separator });
        }
        break_line(out, style, level + 1);
        write_item(out, item);
    }
    if !is_empty {
        break_line(out, style, level);
    }
    out.push(close);
}

fn break_line(out: &mut String, style: &DumpStyle, level: usize) {
    if let Some(indent) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * level));
    }
}

fn write_string(out: &mut String, text: &str, style: &DumpStyle) {
    let quoted = Value::from(text).to_string();
    if !style.ensure_ascii {
        out.push_str(&quoted);
        return;
    }
    for c in quoted.chars() {
        if c.is_ascii() {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            write!(out, "\\u{unit:04x}").expect("a string takes everything");
        }
    }
}

/// Formats a time, in UTC, with the directives of `strftime` that templates use; an unknown one stays as it is.
pub(super) fn strftime(format: &str, time: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut directives = format.chars();
    while let Some(c) = directives.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = directives.next();
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second_of_day / 3600),
            Some('M') => format!("{:02}", second_of_day / 60 % 60),
            Some('S') => format!("{:02}", second_of_day % 60),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }
    out
}

/// Year, month and day of a number of days since 1970-01-01 (Gregorian; eras of 400 years that begin in March).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn dumps_as_python_does() {
        let value = json!({"b": [1, 2.5, null, true], "a": {"x": "é\"\n</"}, "e": [], "f": {}});
        assert_eq!(
            json_dumps(&value, &DumpStyle::default()),
            r#"{"b": [1, 2.5, null, true], "a": {"x": "é\"\n</"}, "e": [], "f": {}}"#
        );
        let style =
            DumpStyle { indent: Some(2), sort_keys: true, ensure_ascii: true, ..DumpStyle::default() };
        let expected = "{\n  \"a\": {\n    \"x\": \"\\u00e9\\\"\\n</\"\n  },\n  \"b\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \
                        \"e\": [],\n  \"f\": {}\n}";
        assert_eq!(json_dumps(&value, &style), expected);
    }

    #[test]
    fn formats_times() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(strftime("%A %d %B %Y %H:%M:%S", at(0)), "Thursday 01 January 1970 00:00:00");
        assert_eq!(strftime("%a, %d %b %y %%|%q|%", at(951_782_400)), "Tue, 29 Feb 00 %|%q|%");
        assert_eq!(strftime("%Y-%m-%d", at(1_767_225_599)), "2025-12-31");
    }
}

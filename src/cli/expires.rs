//! `--expires`: a time, or how long from now.

use chrono::DateTime;

use crate::units::now_unix_ms;

/// Milliseconds since the epoch of a time in RFC 3339, or of a span from now.
///
/// # Errors
/// A sentence for people.
pub(super) fn parse(text: &str) -> Result<i64, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.timestamp_millis());
    }
    span_ms(text)
        .and_then(|span| now_unix_ms().checked_add(span))
        .ok_or_else(|| "give a span like `90s`, `12h` or `1d6h`, or a time like `2030-01-31T12:00:00Z`".to_owned())
}

/// `1d6h30m` in milliseconds; each unit once, the largest first, and not nothing.
fn span_ms(text: &str) -> Option<i64> {
    let mut rest = text;
    let mut total = 0_i64;
    for (unit, ms) in [('d', 86_400_000), ('h', 3_600_000), ('m', 60_000), ('s', 1000)] {
        if let Some((number, after)) = rest.split_once(unit)
            && number.bytes().all(|byte| byte.is_ascii_digit())
        {
            total = total.checked_add(number.parse::<i64>().ok()?.checked_mul(ms)?)?;
            rest = after;
        }
    }
    (rest.is_empty() && total > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_whole_or_not_at_all() {
        for (text, ms) in [("90s", 90_000), ("12h", 43_200_000), ("1d6h", 108_000_000), ("1d2h3m4s", 93_784_000)] {
            assert_eq!(span_ms(text), Some(ms), "{text}");
        }
        for text in ["", "0s", "s", "5", "-5s", "6h1d", "1h 5m", "1.5h", "99999999999999999d", "1w"] {
            assert_eq!(span_ms(text), None, "{text}");
        }
    }

    #[test]
    fn times_are_of_any_offset() {
        assert_eq!(parse("1970-01-01T01:00:01+01:00"), Ok(1000));
        assert!(parse("tomorrow").is_err());
        let now = now_unix_ms();
        assert!(parse("1h").is_ok_and(|at| at >= now + 3_600_000));
    }
}

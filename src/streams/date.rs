//! Dates of simplestreams documents: RFC 2822, as `date -R` writes them, and ISO 8601 in UTC, which some publishers use.

/// Seconds of a day.
const DAY_SECS: i64 = 86_400;
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
/// 1 January 1970 was a Thursday.
const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];

/// Seconds since 1970 of `Thu, 09 Oct 2014 13:12:40 +0000` or `2014-10-09T13:12:40Z`; nothing when it is neither.
pub fn parse(text: &str) -> Option<i64> {
    let text = text.trim();
    if text.len() > 64 {
        return None;
    }
    if text.as_bytes().get(4) == Some(&b'-') { iso(text) } else { rfc2822(text) }
}

/// The same seconds as `date -R --utc` writes them.
pub fn format(secs: i64) -> String {
    let days = secs.div_euclid(DAY_SECS);
    let (year, month, day) = civil(days);
    let rest = secs.rem_euclid(DAY_SECS);
    let weekday = DAYS[usize::try_from(days.rem_euclid(7)).unwrap_or(0)];
    let name = MONTHS[usize::try_from(month - 1).unwrap_or(0)];
    format!("{weekday}, {day:02} {name} {year:04} {:02}:{:02}:{:02} +0000", rest / 3600, rest / 60 % 60, rest % 60)
}

/// The day as `20261122`, the way versions of images are named.
pub fn day(secs: i64) -> String {
    let (year, month, day) = civil(secs.div_euclid(DAY_SECS));
    format!("{year:04}{month:02}{day:02}")
}

fn rfc2822(text: &str) -> Option<i64> {
    let text = match text.split_once(',') {
        Some((weekday, rest)) if DAYS.contains(&weekday.trim()) => rest,
        Some(_) => return None,
        None => text,
    };
    let mut words = text.split_ascii_whitespace();
    let day = number(words.next()?, 1, 31)?;
    let name = words.next()?;
    let month = MONTHS.iter().position(|month| *month == name)? as i64 + 1;
    let year = number(words.next()?, 1970, 9999)?;
    let time = clock(words.next()?)?;
    let zone = zone(words.next().unwrap_or("+0000"))?;
    if words.next().is_some() {
        return None;
    }
    Some(days(year, month, day)? * DAY_SECS + time - zone)
}

fn iso(text: &str) -> Option<i64> {
    let (date, rest) = text.split_at_checked(10)?;
    let mut parts = date.split('-');
    let (year, month, day) = (number(parts.next()?, 1970, 9999)?, number(parts.next()?, 1, 12)?, number(parts.next()?, 1, 31)?);
    if parts.next().is_some() {
        return None;
    }
    let midnight = days(year, month, day)? * DAY_SECS;
    if rest.is_empty() {
        return Some(midnight);
    }
    let rest = rest.strip_prefix(['T', ' '])?;
    let cut = rest.find(|c: char| !c.is_ascii_digit() && c != ':').unwrap_or(rest.len());
    let (time, rest) = rest.split_at(cut);
    // Fractions of a second order nothing here.
    let fraction = rest.strip_prefix('.').map_or(rest, |rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
    let zone = match fraction {
        "" => 0,
        given => zone(&given.replace(':', ""))?,
    };
    Some(midnight + clock(time)? - zone)
}

fn clock(text: &str) -> Option<i64> {
    let mut parts = text.split(':');
    let (hours, minutes) = (number(parts.next()?, 0, 23)?, number(parts.next()?, 0, 59)?);
    let seconds = parts.next().map_or(Some(0), |part| number(part, 0, 60))?;
    parts.next().is_none().then_some(hours * 3600 + minutes * 60 + seconds)
}

/// Seconds east of Greenwich.
fn zone(text: &str) -> Option<i64> {
    if matches!(text, "Z" | "UT" | "UTC" | "GMT") {
        return Some(0);
    }
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let (hours, minutes) = digits.split_at_checked(2).filter(|_| digits.len() == 4)?;
    Some(sign * (number(hours, 0, 23)? * 3600 + number(minutes, 0, 59)? * 60))
}

fn number(text: &str, min: i64, max: i64) -> Option<i64> {
    if text.is_empty() || text.len() > 4 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|value| (min..=max).contains(value))
}

/// Days since 1970 of a date of the Gregorian calendar; nothing for 31 June.
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    // Years that begin in March: the leap day is the last of its year, and a month's first day is linear in its number.
    let (from_march, of_year) = if month > 2 { (month - 3, year) } else { (month + 9, year - 1) };
    let day_of_year = (153 * from_march + 2) / 5 + day - 1;
    let era = of_year.div_euclid(400);
    let in_era = of_year.rem_euclid(400);
    let days = era * 146_097 + in_era * 365 + in_era / 4 - in_era / 100 + day_of_year - 719_468;
    (civil(days) == (year, month, day)).then_some(days)
}

/// Year, month and day of a number of days since 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, in_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let day_of_year = in_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day_of_year - (153 * from_march + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_real_publishers_are_read() {
        for (text, secs) in [
            ("Thu, 09 Oct 2014 13:12:40 +0000", 1_412_860_360),
            ("Thu, 09 Oct 2014 15:12:40 +0200", 1_412_860_360),
            ("09 Oct 2014 13:12:40 GMT", 1_412_860_360),
            ("2014-10-09T13:12:40Z", 1_412_860_360),
            ("2014-10-09T13:12:40.25+00:00", 1_412_860_360),
            ("2014-10-09", 1_412_812_800),
            ("Thu, 29 Feb 2024 00:00:00 +0000", 1_709_164_800),
        ] {
            assert_eq!(parse(text), Some(secs), "{text}");
        }
        for bad in
            ["", "yesterday", "Thu, 31 Jun 2014 13:12:40 +0000", "Thu, 29 Feb 2023 00:00:00 +0000", "Thu, 09 Oct 2014 25:12:40 +0000", "2014-13-01"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(day(1_412_860_360), "20141009");
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read_again(secs in 0i64..253_402_300_799) {
            proptest::prop_assert_eq!(parse(&format(secs)), Some(secs));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,40}") {
            let _ = parse(&text);
        }
    }
}

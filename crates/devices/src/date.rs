//! Dates of the proleptic Gregorian calendar in UTC, to and from seconds since 1970. Pure arithmetic, no time zones, no
//! leap seconds; years 0 to 9999, which is what a clock with two-digit year and century registers can show.

const SECONDS_PER_DAY: i64 = 86_400;
/// Days from 1 March of year 0 to 1 January 1970.
const MARCH_0_TO_1970: i64 = 719_468;
/// Days in 400 years, after which the calendar repeats.
const DAYS_PER_ERA: i64 = 146_097;

/// 0000-01-01 00:00:00.
pub(crate) const MIN_UNIX: i64 = -62_167_219_200;
/// 9999-12-31 23:59:59.
pub(crate) const MAX_UNIX: i64 = 253_402_300_799;

/// A point in time as a clock shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DateTime {
    /// 0 to 9999.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

impl DateTime {
    /// The date and time `unix` seconds after the start of 1970; clamped to years 0 to 9999.
    pub(crate) fn from_unix(unix: i64) -> Self {
        let unix = unix.clamp(MIN_UNIX, MAX_UNIX);
        let (days, time) = (unix.div_euclid(SECONDS_PER_DAY), unix.rem_euclid(SECONDS_PER_DAY));

        // Years are counted from 1 March, so that the leap day is the last of its year.
        let days = days + MARCH_0_TO_1970;
        let (era, day_of_era) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
        let leap_days_passed = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
        let year_of_era = (day_of_era - leap_days_passed) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // From March on, months of 31 and 30 days follow a pattern of 153 days per five months.
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = (month_from_march + 2) % 12 + 1;
        let year = era * 400 + year_of_era + i64::from(month <= 2);

        Self {
            year: u16::try_from(year).unwrap_or(0),
            month: small(month),
            day: small(day),
            hour: small(time / 3600),
            minute: small(time / 60 % 60),
            second: small(time % 60),
        }
    }

    /// Seconds since the start of 1970; `None` if this is no date or time of day.
    pub(crate) fn to_unix(self) -> Option<i64> {
        let day_exists = (1..=12).contains(&self.month)
            && (1..=days_in_month(self.year, self.month)).contains(&self.day)
            && self.year <= 9999;
        if !day_exists || self.hour > 23 || self.minute > 59 || self.second > 59 {
            return None;
        }
        let month = i64::from(self.month);
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_PER_ERA + day_of_era - MARCH_0_TO_1970;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        Some(days * SECONDS_PER_DAY + time)
    }
}

/// Day of the week `unix` seconds after the start of 1970: 1 is Sunday, 7 is Saturday.
pub(crate) fn weekday(unix: i64) -> u8 {
    // 1 January 1970 was a Thursday.
    small((unix.div_euclid(SECONDS_PER_DAY) + 4).rem_euclid(7) + 1)
}

fn is_leap(year: u16) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_month(year: u16, month: u8) -> u8 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if is_leap(year) => 29,
        2 => 28,
        _ => 31,
    }
}

/// A part of a date, which always fits.
fn small(part: i64) -> u8 {
    u8::try_from(part).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn date(year: u16, month: u8, day: u8) -> DateTime {
        DateTime { year, month, day, hour: 0, minute: 0, second: 0 }
    }

    /// Counts days one at a time: slow, and independent of the arithmetic above.
    struct Almanac {
        date: DateTime,
        unix: i64,
        weekday: u8,
    }

    impl Almanac {
        /// 1 January 1600 was a Saturday, 135 140 days before 1970.
        fn start() -> Self {
            Self { date: date(1600, 1, 1), unix: -135_140 * 86_400, weekday: 7 }
        }

        fn next_day(&mut self) {
            let y = self.date.year;
            let leap = if y.is_multiple_of(100) { y.is_multiple_of(400) } else { y.is_multiple_of(4) };
            let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            self.date.day += 1;
            if self.date.day > lengths[usize::from(self.date.month) - 1] {
                (self.date.day, self.date.month) = (1, self.date.month + 1);
            }
            if self.date.month > 12 {
                (self.date.month, self.date.year) = (1, y + 1);
            }
            self.unix += 86_400;
            self.weekday = self.weekday % 7 + 1;
        }
    }

    #[test]
    fn every_day_of_nine_centuries_agrees_with_an_almanac() {
        let mut almanac = Almanac::start();
        let mut seen_1970 = false;
        while almanac.date.year < 2500 {
            assert_eq!(DateTime::from_unix(almanac.unix), almanac.date);
            assert_eq!(almanac.date.to_unix(), Some(almanac.unix));
            assert_eq!(weekday(almanac.unix), almanac.weekday, "{:?}", almanac.date);
            seen_1970 |= almanac.unix == 0 && almanac.date == date(1970, 1, 1) && almanac.weekday == 5;
            almanac.next_day();
        }
        assert!(seen_1970);
    }

    #[test]
    fn times_outside_the_clock_are_clamped() {
        assert_eq!(DateTime::from_unix(i64::MIN), date(0, 1, 1));
        let last = DateTime { hour: 23, minute: 59, second: 59, ..date(9999, 12, 31) };
        assert_eq!(DateTime::from_unix(i64::MAX), last);
        assert_eq!(last.to_unix(), Some(MAX_UNIX));
        assert_eq!(date(0, 1, 1).to_unix(), Some(MIN_UNIX));
    }

    #[test]
    fn what_is_no_date_or_time_is_refused() {
        for bad in [
            date(2023, 2, 29),
            date(1900, 2, 29),
            date(2024, 0, 1),
            date(2024, 13, 1),
            date(2024, 4, 31),
            date(2024, 4, 0),
        ] {
            assert_eq!(bad.to_unix(), None, "{bad:?}");
        }
        assert!(date(2024, 2, 29).to_unix().is_some());
        assert_eq!(DateTime { hour: 24, ..date(2024, 1, 1) }.to_unix(), None);
        assert_eq!(DateTime { second: 60, ..date(2024, 1, 1) }.to_unix(), None);
        assert_eq!(date(10_000, 1, 1).to_unix(), None);
    }

    proptest! {
        #[test]
        fn a_time_becomes_a_date_and_the_same_time_again(unix in MIN_UNIX..=MAX_UNIX) {
            prop_assert_eq!(DateTime::from_unix(unix).to_unix(), Some(unix));
        }

        #[test]
        fn any_fields_are_refused_or_come_back(
            year: u16, month in 0_u8..15, day in 0_u8..34, hour in 0_u8..26, minute in 0_u8..62, second in 0_u8..62
        ) {
            let date = DateTime { year, month, day, hour, minute, second };
            if let Some(unix) = date.to_unix() {
                prop_assert_eq!(DateTime::from_unix(unix), date);
            }
        }
    }
}

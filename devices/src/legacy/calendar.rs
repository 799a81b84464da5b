//! Seconds since 1970 to a date in the Gregorian calendar, and back.

/// A date and time of day as the RTC holds it. Fields can be out of range when a guest wrote them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct DateTime {
    /// Year, 0..=9999 when in range.
    pub year: u16,
    /// Month, 1..=12.
    pub month: u8,
    /// Day of the month, 1..=31.
    pub day: u8,
    /// 0..=23.
    pub hour: u8,
    /// 0..=59.
    pub minute: u8,
    /// 0..=59.
    pub second: u8,
}

const DAY: i64 = 86_400;
/// Days in 400 years, after which the calendar repeats.
const ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;

impl DateTime {
    /// The date `seconds` after 1970-01-01 00:00:00; years outside of 0..=9999 are clamped to them.
    pub fn from_seconds(seconds: i64) -> Self {
        // 0000-01-01 and 9999-12-31 23:59:59.
        let seconds = seconds.clamp(-62_167_219_200, 253_402_300_799);
        let of_day = seconds.rem_euclid(DAY);
        let days = seconds.div_euclid(DAY) + EPOCH;
        let era = days.div_euclid(ERA);
        let of_era = days.rem_euclid(ERA);
        // Years that begin in March have their leap day at the end.
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        // All of these are in range by construction.
        Self {
            year: year as u16,
            month: month as u8,
            day: (of_year - (153 * from_march + 2) / 5 + 1) as u8,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00:00. Fields out of range carry over into the next larger one.
    pub fn to_seconds(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let from_march = (month + 9) % 12;
        let of_year = (153 * from_march + 2) / 5 + i64::from(self.day) - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA + of_era - EPOCH;
        let of_day =
            i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        days * DAY + of_day
    }

    /// The day of the week, 1 (Sunday) to 7.
    pub fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        ((self.to_seconds().div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        for (seconds, date, weekday) in [
            (0, (1970, 1, 1, 0, 0, 0), 5),
            (951_782_400, (2000, 2, 29, 0, 0, 0), 3),
            (1_709_251_199, (2024, 2, 29, 23, 59, 59), 5),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0), 2),
            (-1, (1969, 12, 31, 23, 59, 59), 4),
            (253_402_300_799, (9999, 12, 31, 23, 59, 59), 6),
        ] {
            let (year, month, day, hour, minute, second) = date;
            let date = DateTime { year, month, day, hour, minute, second };
            assert_eq!(DateTime::from_seconds(seconds), date);
            assert_eq!((date.to_seconds(), date.weekday()), (seconds, weekday));
        }
    }

    #[test]
    fn every_day_of_ten_thousand_years_goes_there_and_back() {
        let first = DateTime { month: 1, day: 1, ..Default::default() }.to_seconds();
        let mut before = DateTime::default();
        for day in 0..3_652_425 {
            let seconds = first + day * DAY + 45_296;
            let date = DateTime::from_seconds(seconds);
            assert_eq!(date.to_seconds(), seconds);
            let follows =
                (date.year, date.month, date.day) > (before.year, before.month, before.day);
            assert!(follows, "{date:?}");
            before = date;
        }
        assert_eq!(DateTime::from_seconds(i64::MIN).year, 0);
        assert_eq!(DateTime::from_seconds(i64::MAX).year, 9999);
    }
}

//! The display: a table of machines, and below it exits and queues of the one that is chosen.

use ratatui::Frame as Screen;
use ratatui::crossterm::event::KeyCode;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Row, Table};

use super::Sort;
use super::frame::{Frame, Machine};

/// The longest interval, in seconds.
const MAX_INTERVAL: u64 = 3600;

/// What is on the screen.
pub(super) struct View {
    frame: Frame,
    sort: Sort,
    reverse: bool,
    paused: bool,
    chosen: Option<String>,
    interval: u64,
}

impl View {
    pub(super) fn new(sort: Sort, interval: u64) -> Self {
        Self { frame: Frame::default(), sort, reverse: false, paused: false, chosen: None, interval }
    }

    /// Seconds between two looks.
    pub(super) fn interval(&self) -> u64 {
        self.interval
    }

    /// Shows another frame, if the display does not stand still.
    pub(super) fn take(&mut self, frame: Frame) {
        if !self.paused {
            self.frame = frame;
            self.frame.sort(self.sort, self.reverse);
        }
    }

    /// Does what a key asks for; false if that is to end.
    pub(super) fn key(&mut self, key: KeyCode) -> bool {
        match key {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('s') => self.sort = self.sort.step(1),
            KeyCode::Char('S') => self.sort = self.sort.step(Sort::ALL.len() - 1),
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char(' ' | 'p') => self.paused = !self.paused,
            KeyCode::Char('+') => self.interval = (self.interval + 1).min(MAX_INTERVAL),
            KeyCode::Char('-') => self.interval = self.interval.saturating_sub(1).max(1),
            KeyCode::Down | KeyCode::Char('j') => self.choose(1),
            KeyCode::Up | KeyCode::Char('k') => self.choose(self.frame.machines.len().saturating_sub(1)),
            _ => {}
        }
        self.frame.sort(self.sort, self.reverse);
        true
    }

    /// Chooses the machine `steps` below.
    fn choose(&mut self, steps: usize) {
        let at = self.at() + steps;
        self.chosen = self.frame.machines.iter().cycle().nth(at).map(|machine| machine.name.clone());
    }

    /// Where the machine is that is chosen.
    fn at(&self) -> usize {
        self.frame
            .machines
            .iter()
            .position(|machine| Some(&machine.name) == self.chosen.as_ref())
            .unwrap_or(0)
    }

    pub(super) fn draw(&self, screen: &mut Screen<'_>) {
        let machines = u16::try_from(self.frame.machines.len()).unwrap_or(u16::MAX);
        let [head, list, below] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(machines.saturating_add(1).min(screen.area().height / 2)),
            Constraint::Min(0),
        ])
        .areas(screen.area());
        let [exits, queues] =
            Layout::horizontal([Constraint::Percentage(45), Constraint::Percentage(55)]).areas(below);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        screen.render_widget(Line::styled(self.title(), bold), head);
        self.draw_machines(screen, list);
        let chosen = self.frame.machines.get(self.at());
        let title =
            |what: &str| chosen.map_or_else(String::new, |machine| format!(" {what} of {} ", machine.name));
        let rows = |machine: Option<&Machine>| machine.map(Machine::exits).unwrap_or_default();
        draw_table(
            screen,
            exits,
            title("exits"),
            ["EXIT", "PER SECOND", "COUNT", "HANDLE P50"],
            rows(chosen),
        );
        let rows = chosen.map(Machine::queues).unwrap_or_default();
        let head = ["QUEUE", "PER SECOND", "BYTES/S", "WAIT P50", "WAIT P99", "WORK P50"];
        draw_table(screen, queues, title("queues"), head, rows);
    }

    fn title(&self) -> String {
        let still = if self.paused { ", standing still" } else { "" };
        format!(
            "freestone top: {} machines, every {} s, by {}{still}   q quit, s sort, space pause",
            self.frame.machines.len(),
            self.interval,
            self.sort.name()
        )
    }

    fn draw_machines(&self, screen: &mut Screen<'_>, area: Rect) {
        let at = self.at();
        // Those around the one that is chosen, if there is no room for all.
        let room = usize::from(area.height.saturating_sub(1)).max(1);
        let first = (at + 1).saturating_sub(room);
        let rows = self.frame.machines.iter().enumerate().skip(first).take(room).map(|(index, machine)| {
            let style =
                if index == at { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
            Row::new(machine.cells()).style(style)
        });
        let widths = [24, 9, 7, 10, 10, 10, 10, 10].map(Constraint::Min);
        let head = Row::new(Machine::HEAD).style(Style::new().add_modifier(Modifier::UNDERLINED));
        screen.render_widget(Table::new(rows, widths).header(head), area);
    }
}

fn draw_table<const N: usize>(
    screen: &mut Screen<'_>,
    area: Rect,
    title: String,
    head: [&'static str; N],
    rows: Vec<[String; N]>,
) {
    let head = Row::new(head).style(Style::new().add_modifier(Modifier::UNDERLINED));
    let widths = [Constraint::Fill(1); N];
    let table = Table::new(rows.into_iter().map(Row::new), widths).header(head);
    screen.render_widget(table.block(Block::new().borders(Borders::TOP).title(title)), area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn view(names: &[&str]) -> View {
        let mut view = View::new(Sort::Name, 1);
        let machine =
            |name: &&str| Machine { name: (*name).to_owned(), state: "running".to_owned(), rates: None };
        view.take(Frame { machines: names.iter().map(machine).collect() });
        view
    }

    #[test]
    fn all_machines_are_shown_and_the_first_is_chosen() {
        let view = view(&["b", "a"]);
        let mut terminal = Terminal::new(TestBackend::new(100, 20)).unwrap();
        terminal.draw(|screen| view.draw(screen)).unwrap();
        let text = terminal.backend().to_string();
        for part in ["2 machines", "NAME", "exits of a", "queues of a"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_screen_of_any_size_is_drawn() {
        let names: Vec<_> = (0..100).map(|n| format!("vm-{n}")).collect();
        let view = view(&names.iter().map(String::as_str).collect::<Vec<_>>());
        for (width, height) in [(1, 1), (10, 2), (200, 3), (80, 24)] {
            Terminal::new(TestBackend::new(width, height)).unwrap().draw(|screen| view.draw(screen)).unwrap();
        }
    }

    #[test]
    fn keys_choose_sort_stop_and_end() {
        let mut view = view(&["a", "b", "c"]);
        assert!(view.key(KeyCode::Down) && view.at() == 1);
        assert!(view.key(KeyCode::Up) && view.key(KeyCode::Up) && view.at() == 2);
        assert!(view.key(KeyCode::Char('s')) && view.sort == Sort::Exits);
        assert!(view.key(KeyCode::Char('-')) && view.interval() == 1);
        assert!(view.key(KeyCode::Char(' ')));
        view.take(Frame::default());
        assert_eq!(view.frame.machines.len(), 3, "it stands still");
        assert!(!view.key(KeyCode::Char('q')));
    }
}

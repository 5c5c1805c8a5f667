//! `freestone image`: making, describing, checking and converting disk images.

mod args;
mod show;

use std::io::IsTerminal;
use std::process::ExitCode;

use freestone_block::tools::{self, CheckReport, ConvertOptions, CreateOptions};
use freestone_block::{Backing, FormatChoice, ImageFormat};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) use self::args::Image;
use self::args::{Action, Check, Convert, Create, Info, NewImage};
use crate::failure::Failure;
use crate::size;

/// The image is damaged.
const CORRUPT: u8 = 2;
/// The image is whole, and wastes space.
const LEAKS: u8 = 3;

pub(crate) fn image(args: &Image) -> Result<ExitCode, Failure> {
    match &args.action {
        Action::Create(args) => create(args),
        Action::Info(args) => info(args),
        Action::Check(args) => check(args),
        Action::Convert(args) => convert(args),
    }
}

/// The options of a new image that `create` and `convert` share.
fn options(new: &NewImage, format: ImageFormat) -> Result<CreateOptions, Failure> {
    let mut options = CreateOptions::default();
    options.format = format;
    options.overwrite = new.force;
    for option in &new.options {
        option.apply(&mut options).map_err(Failure::usage)?;
    }
    Ok(options)
}

fn create(args: &Create) -> Result<ExitCode, Failure> {
    let mut options = options(&args.new, args.format.into())?;
    options.size = args.size;
    options.backing = match (&args.backing, args.backing_format) {
        (Some(backing), Some(format)) => Some((backing.clone(), format.into())),
        _ => None,
    };
    if options.size.is_none() && options.backing.is_none() {
        return Err(Failure::usage(
            "a new image needs a SIZE, or a backing file to take it from; see --help",
        ));
    }
    tools::create(&args.path, &options)?;
    Ok(ExitCode::SUCCESS)
}

fn info(args: &Info) -> Result<ExitCode, Failure> {
    let choice = args.format.choice();
    let chain = if args.chain {
        tools::info_chain(&args.path, choice)?
    } else {
        vec![tools::info(&args.path, choice)?]
    };
    if args.json {
        println!("{:#}", show::json(&chain));
    } else {
        print!("{}", show::text(&chain));
    }
    Ok(ExitCode::SUCCESS)
}

fn check(args: &Check) -> Result<ExitCode, Failure> {
    let format = freestone_block::choose(&args.path, args.format.choice())?;
    if format == ImageFormat::Raw {
        return Err(Failure::new(format!(
            "{:?} is raw: it has nothing to check; say -f qcow2 or --probe if it is not",
            args.path
        )));
    }
    let report = if args.repair { tools::repair_qcow2(&args.path)? } else { tools::check_qcow2(&args.path)? };
    if args.json {
        println!("{:#}", show::report_json(&report));
    } else {
        print!("{}", show::report(&report));
    }
    Ok(status(&report))
}

fn status(report: &CheckReport) -> ExitCode {
    match (report.corruptions, report.leaks) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(LEAKS),
        _ => ExitCode::from(CORRUPT),
    }
}

fn convert(args: &Convert) -> Result<ExitCode, Failure> {
    let mut options = ConvertOptions::default();
    options.source = args.format.choice();
    options.backing = if args.backing { Backing::Allow } else { Backing::Deny };
    options.target = self::options(&args.new, args.output.into())?;
    let bar = bar();
    let outcome = tools::convert(&args.source, &args.target, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    outcome?;
    Ok(ExitCode::SUCCESS)
}

/// A progress bar, for people only.
fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style =
        ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A size in bytes and for people.
fn both(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", size::display(bytes))
}

impl args::SourceFormat {
    fn choice(&self) -> FormatChoice {
        match self.format {
            Some(format) => FormatChoice::Given(format.into()),
            None if self.probe => FormatChoice::Probe,
            None => FormatChoice::Recorded,
        }
    }
}

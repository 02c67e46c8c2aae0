//! Finds the browsers that tests and demo run in, and installs them where that is allowed.

use crate::context::{Context, apt_install, may_apt_install};
use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use std::path::{Path, PathBuf};

/// A place in which the package runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Browser {
    Chromium,
    Firefox,
    Webkit,
    Node,
}

impl Browser {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Chromium => "chromium",
            Self::Firefox => "firefox",
            Self::Webkit => "webkit",
            Self::Node => "node",
        }
    }
}

/// The programs that drive one browser, as environment variables for the Node scripts.
pub(crate) struct Found {
    programs: Vec<(&'static str, PathBuf)>,
}

impl Found {
    pub(crate) fn environment(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        self.programs.iter().map(|(key, path)| (*key, path.as_path()))
    }
}

/// One program: the variable that overrides it, names to look for.
type Program = (&'static str, &'static [&'static str]);

const CHROMIUM: &[Program] = &[(
    "WEBLANE_CHROMIUM",
    &[
        "chromium",
        "chromium-browser",
        "google-chrome-stable",
        "google-chrome",
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
    ],
)];
const FIREFOX: &[Program] =
    &[("WEBLANE_FIREFOX", &["firefox-esr", "firefox", "/Applications/Firefox.app/Contents/MacOS/firefox"])];
const WEBKIT: &[Program] = &[
    ("WEBLANE_WEBKITDRIVER", &["WebKitWebDriver", "/usr/bin/WebKitWebDriver"]),
    (
        "WEBLANE_MINIBROWSER",
        &[
            "/usr/lib/x86_64-linux-gnu/webkit2gtk-4.1/MiniBrowser",
            "/usr/lib/x86_64-linux-gnu/webkit2gtk-4.0/MiniBrowser",
            "/usr/lib/x86_64-linux-gnu/webkitgtk-6.0/MiniBrowser",
            "/usr/lib/aarch64-linux-gnu/webkit2gtk-4.1/MiniBrowser",
            "/usr/lib64/webkit2gtk-4.1/MiniBrowser",
            "/usr/libexec/webkit2gtk-4.1/MiniBrowser",
        ],
    ),
    ("WEBLANE_XVFB_RUN", &["xvfb-run"]),
    ("WEBLANE_DBUS_RUN", &["dbus-run-session"]),
];

/// Finds a browser or installs it; the error says what to type.
pub(crate) fn ensure(ctx: &Context, browser: Browser) -> Result<Found> {
    let (programs, packages): (&[Program], &[&str]) = match browser {
        Browser::Chromium => (CHROMIUM, &["chromium"]),
        Browser::Firefox => (FIREFOX, &["firefox-esr"]),
        Browser::Webkit => (WEBKIT, &["webkit2gtk-driver", "xvfb", "xauth", "dbus"]),
        Browser::Node => (&[], &[]),
    };
    if let Some(found) = find(ctx, programs)? {
        return Ok(found);
    }
    if browser == Browser::Webkit && !cfg!(target_os = "linux") {
        bail!("WebKit is tested through WebKitGTK, which only Linux has");
    }
    if !may_apt_install(ctx) && browser != Browser::Webkit {
        let variable = programs[0].0;
        println!("   no {} found; set {variable} to the program if it is somewhere unusual", browser.name());
    }
    apt_install(ctx, packages, browser.name())?;
    find(ctx, programs)?.with_context(|| format!("{} is installed but was not found", packages.join(" ")))
}

fn find(ctx: &Context, programs: &[Program]) -> Result<Option<Found>> {
    let mut found = Vec::new();
    for (variable, names) in programs {
        let path = match std::env::var(variable) {
            Ok(name) => {
                Some(ctx.find_program(&name).with_context(|| format!("{variable} is {name}, which does not exist"))?)
            }
            Err(_) => names.iter().find_map(|name| ctx.find_program(name)),
        };
        match path {
            Some(path) => found.push((*variable, path)),
            None => return Ok(None),
        }
    }
    Ok(Some(Found { programs: found }))
}

#!/bin/sh
# Put Chromium on this machine for the tests of the page, where Debian's packages can be had. Without it those tests are skipped, and say so.
set -eu
for name in chromium chromium-browser google-chrome; do command -v "$name" >/dev/null && exit 0; done
command -v apt-get >/dev/null || { echo 'No Chromium here: the tests of the page will be skipped. Install Chromium to run them.' >&2; exit 0; }
sudo=''; [ "$(id -u)" = 0 ] || sudo='sudo -n'
echo 'No Chromium here: installing the package chromium' >&2
{ $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
  echo 'Could not install it: the tests of the page will be skipped. Run: sudo apt-get install chromium' >&2

# Sourced by the recipes: sets `mirror` to the Debian mirror that packages come from, the one
# this host's own apt uses where the host is a Debian. LODGE_MIRROR overrides it.
mirror=${LODGE_MIRROR:-}
if [ -z "$mirror" ] && command -v apt-get >/dev/null; then
    mirror=$(apt-get indextargets --format '$(SITE)' 2>/dev/null | grep -E '/debian/?$' | head -n 1 || true)
fi
mirror=${mirror:-http://deb.debian.org/debian}
mirror=${mirror%/}

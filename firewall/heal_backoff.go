package firewall

import "time"

// backoff keeps two managers from fighting: the first heals are at once, then
// each waits twice as long as the one before, and after the last one nothing is
// healed until somebody applies. A quiet window forgives.
type backoff struct {
	free    int           // heals at once
	most    int           // heals in all
	first   time.Duration // the first wait
	longest time.Duration
	window  time.Duration
	heals   int
	last    time.Time
	said    bool // that it is over
}

func newBackoff() backoff {
	return backoff{free: 5, most: 15, first: time.Second, longest: 2 * time.Minute, window: 10 * time.Minute}
}

// wait is how long the next heal has to wait.
func (b *backoff) wait(now time.Time) time.Duration {
	if b.heals < b.most && now.Sub(b.last) > b.window {
		b.heals = 0
	}
	if b.heals < b.free {
		return 0
	}
	pause := b.longest
	if n := b.heals - b.free; n < 20 {
		pause = min(pause, b.first<<n)
	}
	return max(0, b.last.Add(pause).Sub(now))
}

// over reports that no more is healed.
func (b *backoff) over() bool { return b.heals >= b.most }

func (b *backoff) healed(now time.Time) {
	b.heals++
	b.last = now
}

// forget begins anew.
func (b *backoff) forget() { b.heals, b.last, b.said = 0, time.Time{}, false }

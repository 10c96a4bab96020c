package main

import (
	"strings"
	"testing"

	"filo/builder/sandbox"
)

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		flags string
		want  sandbox.Limits
	}{
		{"", sandbox.Limits{}},
		{"--memory=64m", sandbox.Limits{Memory: 64 << 20}},
		{"-m=1g --memory-swap=-1", sandbox.Limits{Memory: 1 << 30, MemorySwap: -1}},
		{"--cpus=1.5", sandbox.Limits{CPUPeriod: 100_000, CPUQuota: 150_000}},
		{"-c=512 --cpuset-cpus=0-1,3 --pids-limit=100", sandbox.Limits{CPUShares: 512, CPUs: "0-1,3", PIDs: 100}},
		{"--resource=memory=64m,cpu-quota=5000,cpu-period=10000", sandbox.Limits{Memory: 64 << 20, CPUQuota: 5000, CPUPeriod: 10000}},
		{"--resource=memory=64m --memory=32m", sandbox.Limits{Memory: 32 << 20}},
		{"--pids-limit=-1", sandbox.Limits{}},
	} {
		f := parseFlags(t, strings.Fields(c.flags)...)
		req, err := f.request(variables())
		if err != nil || req.Limits != c.want {
			t.Errorf("%s: %+v, %v, want %+v", c.flags, req.Limits, err, c.want)
		}
	}
	for _, c := range []struct{ flags, want string }{
		{"--memory=1m", "at least 6m"},
		{"--memory=lots", "lots"},
		{"--memory-swap=1g", "needs --memory"},
		{"--memory=1g --memory-swap=512m", "less than --memory"},
		{"--cpus=0", "processors"},
		{"--cpus=NaN", "processors"},
		{"--cpuset-cpus=2-1", "0-2,7"},
		{"--cpuset-cpus=../x", "0-2,7"},
		{"--resource=memory", "NAME=VALUE"},
		{"--resource=disk=1g", "no such resource"},
	} {
		_, err := parseFlags(t, strings.Fields(c.flags)...).request(variables())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one that says %q", c.flags, err, c.want)
		}
	}
}

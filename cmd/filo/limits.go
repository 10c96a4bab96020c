package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/pflag"
	"github.com/tonistiigi/go-csvvalue"

	"filo/builder/sandbox"
)

// limitFlags bound what a step uses. They say nothing about its result, so no key knows them.
type limitFlags struct {
	values   map[string]string // by the name of the resource, as --resource has it
	resource []string
}

// limitNames are the flags of docker build for single resources, with their one-letter names, and ours.
var limitNames = []struct{ name, short, usage string }{
	{"memory", "m", "most memory of a RUN: a `size` like 512m"},
	{"memory-swap", "", "most memory and swap together; -1 for any amount of swap"},
	{"cpus", "", "most processors of a RUN: a `number` like 1.5"},
	{"cpu-period", "", "period of --cpu-quota in `microseconds` (default 100000)"},
	{"cpu-quota", "", "processor time of a RUN in a period, in `microseconds`"},
	{"cpu-shares", "c", "share of a RUN in the processors when others want them too; 1024 is ordinary"},
	{"cpuset-cpus", "", "processors of a RUN, like `0-2,7`"},
	{"cpuset-mems", "", "memory nodes of a RUN, like `0,1`"},
	{"pids-limit", "", "most processes and threads of a RUN"},
}

func (f *limitFlags) register(fs *pflag.FlagSet) {
	f.values = map[string]string{}
	for _, n := range limitNames {
		fs.VarP(&limitFlag{f.values, n.name}, n.name, n.short, n.usage)
	}
	fs.StringArrayVar(&f.resource, "resource", nil, "the same in one flag: `memory=SIZE,cpu-quota=N,…`")
}

// limitFlag is the value of one of these flags.
type limitFlag struct {
	values map[string]string
	name   string
}

func (v *limitFlag) String() string { return v.values[v.name] }
func (v *limitFlag) Type() string   { return "string" }

// Set keeps the value; the last one counts.
func (v *limitFlag) Set(s string) error {
	v.values[v.name] = s
	return nil
}

// limits returns what the flags say.
func (f *limitFlags) limits() (sandbox.Limits, error) {
	var l sandbox.Limits
	for _, r := range f.resource {
		fields, err := csvvalue.Fields(r, nil)
		if err != nil {
			return l, fmt.Errorf("--resource %q: %w", r, err)
		}
		for _, field := range fields {
			name, value, ok := strings.Cut(field, "=")
			if !ok {
				return l, fmt.Errorf("--resource %q: want NAME=VALUE", field)
			}
			if err := setLimit(&l, name, value); err != nil {
				return l, fmt.Errorf("--resource %s: %w", field, err)
			}
		}
	}
	for _, n := range limitNames {
		value, ok := f.values[n.name]
		if !ok {
			continue
		}
		if err := setLimit(&l, n.name, value); err != nil {
			return l, fmt.Errorf("--%s %q: %w", n.name, value, err)
		}
	}
	if l.MemorySwap > 0 && l.MemorySwap < l.Memory {
		return l, fmt.Errorf("--memory-swap: counts memory and swap together, so it cannot be less than --memory")
	}
	if l.MemorySwap != 0 && l.Memory == 0 {
		return l, fmt.Errorf("--memory-swap: needs --memory")
	}
	return l, nil
}

// minMemory is Docker's: with less, a container cannot start.
const minMemory = 6 << 20

func setLimit(l *sandbox.Limits, name, value string) (err error) {
	switch name {
	case "memory":
		if l.Memory, err = units.RAMInBytes(value); err == nil && l.Memory > 0 && l.Memory < minMemory {
			err = fmt.Errorf("at least 6m are needed")
		}
	case "memory-swap":
		if value == "-1" {
			l.MemorySwap = -1
			return nil
		}
		l.MemorySwap, err = units.RAMInBytes(value)
	case "cpus":
		var n float64
		n, err = strconv.ParseFloat(value, 64)
		if err == nil && !(n >= 0.01 && n <= 1<<16) {
			err = fmt.Errorf("must be a number of processors, 0.01 or more")
		}
		l.CPUPeriod, l.CPUQuota = 100_000, int64(math.Round(n*100_000))
	case "cpu-period":
		l.CPUPeriod, err = between0(value, 1000, 1_000_000)
	case "cpu-quota":
		l.CPUQuota, err = between0(value, 1000, math.MaxInt64)
	case "cpu-shares":
		l.CPUShares, err = between0(value, 2, 262144)
	case "cpuset-cpus":
		l.CPUs, err = cpuList(value)
	case "cpuset-mems":
		l.Mems, err = cpuList(value)
	case "pids-limit", "pids":
		l.PIDs, err = between0(value, 1, 1<<22)
	default:
		err = fmt.Errorf("no such resource; there are memory, memory-swap, cpus, cpu-period, cpu-quota, cpu-shares, cpuset-cpus, cpuset-mems, pids-limit")
	}
	return err
}

// between0 reads a number; 0 and -1 are no limit.
func between0(s string, least, most int64) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case err != nil:
		return 0, fmt.Errorf("not a number")
	case n == 0 || n == -1:
		return 0, nil
	case n < least || n > most:
		return 0, fmt.Errorf("must be from %d to %d", least, most)
	}
	return n, nil
}

// cpuList checks a list like "0-2,7".
func cpuList(s string) (string, error) {
	for part := range strings.SplitSeq(s, ",") {
		from, to, ok := strings.Cut(part, "-")
		a, err := strconv.ParseUint(from, 10, 16)
		b := a
		if err == nil && ok {
			b, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || b < a {
			return "", fmt.Errorf("want a list like 0-2,7")
		}
	}
	return s, nil
}

// checkLimits makes sure that limits can be set; where they cannot, the build goes on without them.
func (j *job) checkLimits() {
	if err := j.req.Limits.Try(); err != nil {
		j.warn(fmt.Sprintf("steps run without limits: %v", err))
		j.req.Limits = sandbox.Limits{}
	}
}

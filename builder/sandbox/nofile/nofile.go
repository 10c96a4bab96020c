// Package nofile knows how many files this process could open when it was started, which is what a process that it starts
// shall be able to.
//
// Package syscall raises the limit when it initializes, and tells nobody what it was. Of packages that are ready, the
// language initializes the one with the lowest path first: this one imports nothing, so it comes before syscall. That is
// why it asks the kernel by itself. Do not let it import anything.
//
// Start at [Limit].
package nofile

// first is what the kernel said, soft and hard.
var first [2]uint64

func init() { ask(&first) }

// Limit returns the soft and the hard RLIMIT_NOFILE of getrlimit(2) as this process got them. They are not known on
// architectures without a file ask_*.s here.
func Limit() (soft, hard uint64, known bool) { return first[0], first[1], first[1] != 0 }

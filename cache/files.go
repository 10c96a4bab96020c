package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"filo/layer/rootfs"
)

// margin is how much older than its record a file's change time must be: a file changed again within one tick of the
// file system's clock looks unchanged to stat (git's racy rule). Two seconds is the coarsest clock in use (FAT, NFS).
const margin = 2 * time.Second

// filesMagic starts a file of remembered digests and names its form: after it the SHA-256 of the rest, then records
// of a path (uvarint length, bytes) and [remembered] in little endian.
const filesMagic = "filo files 1\n"

// Files remembers the digests of one directory's files by what stat says of them. It is safe for concurrent use.
type Files struct {
	s       *Store
	path    string
	mu      sync.RWMutex
	known   map[string]remembered
	changed bool
}

// remembered is what was seen of a file when it was hashed.
type remembered struct {
	Size, Dev, Ino      int64
	Mtime, Ctime, Noted int64 // nanoseconds since the epoch
	Sum                 [sha256.Size]byte
}

// Files opens what is remembered of the directory root, named by its absolute path. What cannot be read is nothing.
func (s *Store) Files(root string) *Files {
	sum := sha256.Sum256([]byte(root))
	f := &Files{s: s, path: filepath.Join(s.dir, "files", hex.EncodeToString(sum[:])), known: map[string]remembered{}}
	b, err := os.ReadFile(f.path)
	if err == nil && !f.decode(b) {
		f.known = map[string]remembered{}
		s.repaired("remembered digests of files in " + root)
	}
	if f.latest() > s.now().Add(margin).UnixNano() {
		f.known = map[string]remembered{} // the clock was set back: change times do not tell what came first
	}
	return f
}

// latest is when something was remembered last, in nanoseconds since the epoch.
func (f *Files) latest() (t int64) {
	for _, r := range f.known {
		t = max(t, r.Noted)
	}
	return t
}

// Known returns the remembered digest of the file at path, which st describes, if nothing stat shows has changed since
// and the change before was safely older than the record.
func (f *Files) Known(path string, st rootfs.Stat) (digest.Digest, bool) {
	f.mu.RLock()
	old, ok := f.known[path]
	f.mu.RUnlock()
	now := seen(st)
	now.Noted, now.Sum = old.Noted, old.Sum
	if !ok || now != old || old.Ctime >= old.Noted-int64(margin) {
		return "", false
	}
	return digestOf(old.Sum), true
}

// seen is what stat says.
func seen(st rootfs.Stat) remembered {
	return remembered{
		Size: st.Size, Dev: int64(st.Dev), Ino: int64(st.Ino),
		Mtime: st.Sec*1e9 + st.Nsec, Ctime: st.CSec*1e9 + st.CNsec,
	}
}

// digestOf writes a sum as a digest. It runs for each file of a context.
func digestOf(sum [sha256.Size]byte) digest.Digest {
	const prefix = "sha256:"
	b := append(make([]byte, 0, len(prefix)+2*len(sum)), prefix...)
	return digest.Digest(hex.AppendEncode(b, sum[:]))
}

// Digest returns the digest of the file at path, which st describes: the one that is [Files.Known], or that of what
// open gives.
func (f *Files) Digest(path string, st rootfs.Stat, open func() (io.ReadCloser, error)) (digest.Digest, error) {
	if d, ok := f.Known(path, st); ok {
		return d, nil
	}
	now := seen(st)
	now.Noted = f.s.now().UnixNano()
	r, err := open()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	_, err = io.Copy(h, r)
	if err := errors.Join(err, r.Close()); err != nil {
		return "", err
	}
	h.Sum(now.Sum[:0])
	f.mu.Lock()
	f.known[path], f.changed = now, true
	f.mu.Unlock()
	return digestOf(now.Sum), nil
}

// Save writes what was learned since Files. Of two processes that save at once the later one wins.
func (f *Files) Save() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.changed {
		return nil
	}
	f.changed = false
	return f.s.replace(f.path, f.encode())
}

func (f *Files) encode() []byte {
	b := make([]byte, len(filesMagic)+sha256.Size, len(filesMagic)+sha256.Size+len(f.known)*160)
	copy(b, filesMagic)
	for path, r := range f.known {
		b = binary.AppendUvarint(b, uint64(len(path)))
		b = append(b, path...)
		for _, n := range []int64{r.Size, r.Dev, r.Ino, r.Mtime, r.Ctime, r.Noted} {
			b = binary.LittleEndian.AppendUint64(b, uint64(n))
		}
		b = append(b, r.Sum[:]...)
	}
	sum := sha256.Sum256(b[len(filesMagic)+sha256.Size:])
	copy(b[len(filesMagic):], sum[:])
	return b
}

// rememberedSize is how long a record is after its path.
const rememberedSize = 6*8 + sha256.Size

// decode fills f.known from b and reports whether b is whole.
func (f *Files) decode(b []byte) bool {
	rest, ok := bytes.CutPrefix(b, []byte(filesMagic))
	if !ok || len(rest) < sha256.Size {
		return false
	}
	body := rest[sha256.Size:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], rest[:sha256.Size]) {
		return false
	}
	const short = 24 // a path, to guess how many there are
	f.known = make(map[string]remembered, len(body)/(short+rememberedSize))
	text := string(body) // of which the paths are parts
	for len(body) > 0 {
		n, w := binary.Uvarint(body)
		if w <= 0 || n > uint64(len(body)) || uint64(len(body)) < uint64(w)+n+rememberedSize {
			return false
		}
		at := len(text) - len(body) + w
		path := text[at : at+int(n)]
		body = body[w+int(n):]
		var r remembered
		for i, field := range []*int64{&r.Size, &r.Dev, &r.Ino, &r.Mtime, &r.Ctime, &r.Noted} {
			*field = int64(binary.LittleEndian.Uint64(body[8*i:]))
		}
		copy(r.Sum[:], body[6*8:])
		f.known[path] = r
		body = body[rememberedSize:]
	}
	return true
}

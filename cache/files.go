package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"filo/layer/rootfs"
)

// margin is how much older than its record a file's change time must be: a file changed again within one tick of the
// file system's clock looks unchanged to stat (git's racy rule). Two seconds is the coarsest clock in use (FAT, NFS).
const margin = 2 * time.Second

// filesMagic starts a file of remembered digests and names its form. What follows, in little endian: the SHA-256 of the
// rest; when the last digest was noted, as in [remembered]; then the directories that have files, each as
//
//	uvarint, bytes    the path, "" for the root
//	uvarint n         number of files
//	uvarint           how many bytes the names take
//	n rows            see [folder.row], in the order of names
//	names             one after the other
//
// Of a row only the end of its name is looked at before its file is asked for: a context has tens of thousands of files.
const filesMagic = "filo files 2\n"

// Files remembers the digests of one directory's files by what stat says of them. It is safe for concurrent use.
type Files struct {
	s     *Store
	path  string
	old   map[string]*folder // what was remembered before, by path of the directory; it does not change
	noted int64              // when the last of it was
	mu    sync.Mutex
	fresh map[string]remembered // what was learned since, by path of the file
}

// remembered is what was seen of a file when it was hashed.
type remembered struct {
	Size, Dev, Ino      int64
	Mtime, Ctime, Noted int64 // nanoseconds since the epoch
	Digest              digest.Digest
}

// Files opens what is remembered of the directory root, named by its absolute path. What cannot be read is nothing.
func (s *Store) Files(root string) *Files {
	sum := sha256.Sum256([]byte(root))
	f := &Files{s: s, path: filepath.Join(s.dir, "files", hex.EncodeToString(sum[:])), fresh: map[string]remembered{}}
	file, err := os.Open(f.path)
	if err != nil {
		return f
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return f
	}
	old, noted, err := readFiles(file, fi.Size())
	switch {
	case errors.Is(err, errForm): // another filo's
	case err != nil:
		s.repaired("remembered digests of files in " + root)
	case noted <= s.now().Add(margin).UnixNano(): // else the clock was set back: change times do not tell what came first
		f.old, f.noted = old, noted
	}
	return f
}

// Known returns the remembered digest of the file at path, which st describes, if nothing stat shows has changed since
// and the change before was safely older than the record.
func (f *Files) Known(path string, st rootfs.Stat) (digest.Digest, bool) {
	now := seen(st)
	dir, name := split(path)
	if r, ok := f.old[dir].find(name); ok && r.tells(now) {
		return r.Digest, true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.fresh[path]
	return r.Digest, ok && r.tells(now)
}

// split returns the directory of a clean relative path, "" for the root, and the name in it.
func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	return path[:max(i, 0)], path[i+1:]
}

// seen is what stat says.
func seen(st rootfs.Stat) remembered {
	return remembered{
		Size: st.Size, Dev: int64(st.Dev), Ino: int64(st.Ino),
		Mtime: st.Sec*1e9 + st.Nsec, Ctime: st.CSec*1e9 + st.CNsec,
	}
}

// tells reports whether r still says what is in a file that is now as it was seen.
func (r remembered) tells(now remembered) bool {
	now.Noted, now.Digest = r.Noted, r.Digest
	return now == r && r.Ctime < r.Noted-int64(margin)
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
	h, buf := sha256.New(), hashBuffers.Get().(*[64 << 10]byte)
	defer hashBuffers.Put(buf)
	_, err = io.CopyBuffer(h, struct{ io.Reader }{r}, buf[:]) // a WriteTo of r would make a buffer for each file
	if err := errors.Join(err, r.Close()); err != nil {
		return "", err
	}
	now.Digest = digest.NewDigest(digest.SHA256, h)
	f.mu.Lock()
	f.fresh[path] = now
	f.mu.Unlock()
	return now.Digest, nil
}

var hashBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// Save writes what was learned since Files. Of two processes that save at once the later one wins.
func (f *Files) Save() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.fresh) == 0 {
		return nil
	}
	return f.s.replace(f.path, encodeFiles(f.old, f.noted, f.fresh))
}

// folder is what is remembered of a directory, as it is in the file.
type folder struct {
	rows, names string
	next        atomic.Int32 // the row after the one found last: files are mostly asked for in their order
}

// A row is where its name ends, counted from the first, in 4 bytes, what was seen in 8 each, and the digest.
const (
	rowSeen   = 4
	rowDigest = rowSeen + 6*8
	rowSize   = rowDigest + len("sha256:") + 2*sha256.Size
)

func (d *folder) len() int { return len(d.rows) / rowSize }

// end is where the i-th name ends; the first one begins where that of -1 ends.
func (d *folder) end(i int) int {
	if i < 0 {
		return 0
	}
	return int(binary.LittleEndian.Uint32([]byte(d.rows[i*rowSize:][:rowSeen])))
}

func (d *folder) name(i int) string { return d.names[d.end(i-1):d.end(i)] }

func (d *folder) row(i int) (r remembered) {
	row := d.rows[i*rowSize:][:rowSize]
	for i, field := range r.numbers() {
		*field = int64(binary.LittleEndian.Uint64([]byte(row[rowSeen+8*i:][:8])))
	}
	r.Digest = digest.Digest(row[rowDigest:])
	return r
}

// numbers are the fields of r in the order of a row.
func (r *remembered) numbers() [6]*int64 {
	return [...]*int64{&r.Size, &r.Dev, &r.Ino, &r.Mtime, &r.Ctime, &r.Noted}
}

// find returns what is remembered of the file name. Of no folder that is nothing.
func (d *folder) find(name string) (remembered, bool) {
	if d == nil {
		return remembered{}, false
	}
	i := int(d.next.Load())
	if i >= d.len() || d.name(i) != name {
		var ok bool
		if i, ok = sort.Find(d.len(), func(i int) int { return strings.Compare(name, d.name(i)) }); !ok {
			return remembered{}, false
		}
	}
	d.next.Store(int32(i) + 1)
	return d.row(i), true
}

// encodeFiles is a file of what was remembered, by directory, the last of it at noted, and of what was learned since, by path
// of the file. Directories of which nothing was learned are as they were.
func encodeFiles(old map[string]*folder, noted int64, fresh map[string]remembered) []byte {
	learned := map[string]map[string]remembered{}
	for path, r := range fresh {
		dir, name := split(path)
		if learned[dir] == nil {
			learned[dir] = map[string]remembered{}
		}
		learned[dir][name] = r
		noted = max(noted, r.Noted)
	}
	all, size := map[string]*folder{}, 0
	maps.Copy(all, old)
	for dir, files := range learned {
		all[dir] = old[dir].with(files)
	}
	for dir, d := range all {
		size += len(dir) + len(d.rows) + len(d.names) + 3*binary.MaxVarintLen64
	}
	const start = len(filesMagic) + sha256.Size
	b := make([]byte, start, start+8+size)
	copy(b, filesMagic)
	b = binary.LittleEndian.AppendUint64(b, uint64(noted))
	for _, dir := range slices.Sorted(maps.Keys(all)) {
		d := all[dir]
		b = append(binary.AppendUvarint(b, uint64(len(dir))), dir...)
		b = binary.AppendUvarint(b, uint64(d.len()))
		b = binary.AppendUvarint(b, uint64(len(d.names)))
		b = append(append(b, d.rows...), d.names...)
	}
	sum := sha256.Sum256(b[start:])
	copy(b[len(filesMagic):], sum[:])
	return b
}

// with is d with what was learned of files, by name. d may be nil.
func (d *folder) with(files map[string]remembered) *folder {
	names := slices.Collect(maps.Keys(files))
	rows := map[string]string{} // that stay
	if d != nil {
		for i := range d.len() {
			name := d.name(i)
			if _, again := files[name]; !again {
				names = append(names, name)
				rows[name] = d.rows[i*rowSize:][:rowSize]
			}
		}
	}
	slices.Sort(names)
	b := make([]byte, 0, len(names)*rowSize)
	end := 0
	for _, name := range names {
		end += len(name)
		b = binary.LittleEndian.AppendUint32(b, uint32(end))
		if row, ok := rows[name]; ok {
			b = append(b, row[rowSeen:]...)
			continue
		}
		r := files[name]
		for _, n := range r.numbers() {
			b = binary.LittleEndian.AppendUint64(b, uint64(*n))
		}
		b = append(b, r.Digest...)
	}
	return &folder{rows: string(b), names: strings.Join(names, "")}
}

// Why a file of remembered digests is of no use.
var (
	errForm = errors.New("another form")
	errTorn = errors.New("not whole")
)

// readFiles reads size bytes that encodeFiles made, and when the last digest was noted. All strings that it returns are
// parts of one.
func readFiles(r io.Reader, size int64) (old map[string]*folder, noted int64, err error) {
	const start = len(filesMagic) + sha256.Size
	head := make([]byte, start)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, 0, errTorn
	}
	if string(head[:len(filesMagic)]) != filesMagic {
		return nil, 0, errForm
	}
	var b strings.Builder
	b.Grow(max(0, int(size)-start))
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(&b, h), r); err != nil {
		return nil, 0, err
	}
	if !bytes.Equal(h.Sum(nil), head[len(filesMagic):]) {
		return nil, 0, errTorn
	}
	p := parser{text: b.String()}
	noted = int64(p.uint64())
	old = map[string]*folder{}
	for p.text != "" && !p.torn {
		dir := p.take(p.uvarint())
		n, names := p.uvarint(), p.uvarint()
		old[dir] = &folder{rows: p.take(n * rowSize), names: p.take(names)}
		p.torn = p.torn || !old[dir].whole()
	}
	if p.torn {
		return nil, 0, errTorn
	}
	return old, noted, nil
}

// whole reports whether each name ends where the next one may begin.
func (d *folder) whole() bool {
	for i := range d.len() {
		if end := d.end(i); end < d.end(i-1) || end > len(d.names) {
			return false
		}
	}
	return true
}

// parser takes text apart. Torn is set, and stays, where it is too short.
type parser struct {
	text string
	torn bool
}

// take takes the first n bytes.
func (p *parser) take(n int) string {
	if n < 0 || n > len(p.text) {
		p.torn, n = true, 0
	}
	out := p.text[:n]
	p.text = p.text[n:]
	return out
}

func (p *parser) uint64() uint64 {
	b := p.take(8)
	if p.torn {
		return 0
	}
	return binary.LittleEndian.Uint64([]byte(b))
}

// uvarint takes a number of things of which each takes at least a byte.
func (p *parser) uvarint() int {
	n, w := binary.Uvarint([]byte(p.text[:min(len(p.text), binary.MaxVarintLen64)]))
	if w <= 0 || n > uint64(len(p.text)) {
		p.torn, w, n = true, 0, 0
	}
	p.text = p.text[w:]
	return int(n)
}

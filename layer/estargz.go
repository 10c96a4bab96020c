package layer

import (
	"hash"
	"io"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An eStargz blob is a gzip of the layer's tar, each file a member of its own, with one more tar after it: a table of
// contents by which single files can be fetched. Its uncompressed bytes are therefore not the layer's, and an image that
// ships it names another diff ID. For the store it is one more compression of the layer: what follows the layer's tar
// is left out where the blob is read, since no reader of tars looks behind the end of one.

// AnnotationDiffID is what the descriptor of a blob says if its uncompressed bytes have another digest than the layer
// that it is a blob of: the diff ID that an image must name for it. It is BuildKit's, and is for no manifest of an image.
const AnnotationDiffID = "containerd.io/uncompressed"

// annotationOffset says where in an eStargz blob the layer ends and the table of contents begins, in bytes. It is ours.
const annotationOffset = "filo.estargz.toc.offset"

// Annotations of eStargz layers in manifests, by which lazy pullers know them.
const (
	annotationTOC  = estargz.TOCJSONDigestAnnotation
	annotationSize = estargz.StoreUncompressedSizeAnnotation
)

// ManifestAnnotations returns those annotations of a layer's descriptor that belong into manifests; nil for none.
func ManifestAnnotations(d ocispec.Descriptor) map[string]string {
	return picked(d.Annotations, annotationTOC, annotationSize)
}

// BlobAnnotations returns those annotations of a layer's descriptor that the store needs to know again what it is.
func BlobAnnotations(d ocispec.Descriptor) map[string]string {
	return picked(d.Annotations, annotationTOC, annotationSize, AnnotationDiffID, annotationOffset)
}

// picked returns some of all; nil if the first is not there.
func picked(all map[string]string, names ...string) map[string]string {
	if all[names[0]] == "" {
		return nil
	}
	some := map[string]string{}
	for _, name := range names {
		if v, ok := all[name]; ok {
			some[name] = v
		}
	}
	return some
}

// isEStargz says whether the descriptor of a layer tells of a table of contents.
func isEStargz(d ocispec.Descriptor) bool { return d.Annotations[annotationTOC] != "" }

// payload returns the part of a blob that holds its layer: all of it but for eStargz blobs that filo made.
func payload(r io.Reader, d ocispec.Descriptor) io.Reader {
	n, err := strconv.ParseInt(d.Annotations[annotationOffset], 10, 64)
	if err != nil || n <= 0 {
		return r
	}
	return io.LimitReader(r, n)
}

// seekable compresses to eStargz. The library reads tars, so a goroutine passes on what is written, until Close.
type seekable struct {
	in   *io.PipeWriter
	done chan struct{}
	w    *estargz.Writer
	err  error

	toc    digest.Digest
	offset int64
	size   countingHash // of the table of contents
	length int64        // of what was written
}

func newSeekable(w io.Writer, level int) *seekable {
	r, in := io.Pipe()
	s := &seekable{in: in, done: make(chan struct{})}
	s.w = estargz.NewWriterWithCompressor(w, seekableGzip{level, s})
	go func() {
		defer close(s.done)
		s.err = s.w.AppendTarLossLess(r)
		if s.err == nil {
			s.toc, s.err = s.w.Close()
		}
		r.CloseWithError(s.err)
	}()
	return s
}

// Write takes uncompressed bytes.
func (s *seekable) Write(p []byte) (int, error) {
	n, err := s.in.Write(p)
	s.length += int64(n)
	return n, err
}

// Close writes the table of contents.
func (s *seekable) Close() error {
	s.in.Close()
	<-s.done
	return s.err
}

// annotations describe the blob once it is closed.
func (s *seekable) annotations() map[string]string {
	return map[string]string{
		annotationTOC:    s.toc.String(),
		annotationSize:   strconv.FormatInt(s.length+s.size.n, 10),
		AnnotationDiffID: s.w.DiffID(),
		annotationOffset: strconv.FormatInt(s.offset, 10),
	}
}

// seekableGzip makes the members of the blob, with the compressor that other blobs have, and the table of contents as
// the library does.
type seekableGzip struct {
	level int
	s     *seekable
}

// Writer begins a member.
func (z seekableGzip) Writer(w io.Writer) (estargz.WriteFlushCloser, error) {
	return gzip.NewWriterLevel(w, z.level)
}

// WriteTOCAndFooter ends the blob with the table of contents and where it begins.
func (z seekableGzip) WriteTOCAndFooter(w io.Writer, offset int64, toc *estargz.JTOC, diff hash.Hash) (digest.Digest, error) {
	z.s.offset = offset
	z.s.size.Hash = diff
	return estargz.NewGzipCompressorWithLevel(z.level).WriteTOCAndFooter(w, offset, toc, &z.s.size)
}

// countingHash counts what is hashed.
type countingHash struct {
	hash.Hash
	n int64
}

// Write hashes and counts.
func (h *countingHash) Write(p []byte) (int, error) {
	h.n += int64(len(p))
	return h.Hash.Write(p)
}

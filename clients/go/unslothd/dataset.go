package unslothd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// chunkBytes is the largest chunk of the contract.
const chunkBytes = 1 << 20

// Rows returns the source of a small set of rows, which travels inside the request; the server takes 4 MiB at most.
// Each row is what encoding/json makes a JSON object of: a map or a struct.
func Rows[Row any](rows ...Row) (*pb.DatasetSource, error) {
	var lines bytes.Buffer
	encoder := json.NewEncoder(&lines)
	for number, row := range rows {
		if err := encoder.Encode(row); err != nil {
			return nil, fmt.Errorf("row %d: %w", number+1, err)
		}
	}
	inline := &pb.InlineRows{Format: pb.DataFormat_DATA_FORMAT_JSONL, Data: lines.Bytes()}
	return &pb.DatasetSource{Origin: &pb.DatasetSource_Inline{Inline: inline}}, nil
}

// ServerPath returns the source of rows in a file or folder on the server, below one of the roots that its operator
// allows; absolute, or relative to a model root.
func ServerPath(path string) *pb.DatasetSource {
	return &pb.DatasetSource{Origin: &pb.DatasetSource_Path{Path: path}}
}

// HubDataset returns the source of rows in a dataset of the Hugging Face Hub, read by the server.
func HubDataset(hub *pb.HubDataset) *pb.DatasetSource {
	return &pb.DatasetSource{Origin: &pb.DatasetSource_Hub{Hub: hub}}
}

// UploadedDataset returns the source of rows that the server keeps; see Client.UploadDataset.
func UploadedDataset(datasetID string) *pb.DatasetSource {
	return &pb.DatasetSource{Origin: &pb.DatasetSource_DatasetId{DatasetId: datasetID}}
}

// UploadProgress is how far an upload is.
type UploadProgress struct {
	Done  int64 // bytes that were handed to the connection
	Total int64
}

// UploadDataset stores rows on the server, to train on them any number of times. Rows that it has already are not sent.
//
// It reads data to its end twice or more often: to hash it, to send it, and again after a lost connection. Name and
// Format of the header are taken, the hash is filled in. onProgress, which may be nil, is called after each chunk.
//
// Errors: ReasonDatasetRow (FieldViolations names the first 20 bad rows), ReasonDatasetEmpty, ReasonDatasetDamaged,
// ReasonDatasetTooLarge, ReasonDiskFull. Nothing is kept then.
func (c *Client) UploadDataset(
	ctx context.Context, data io.ReadSeeker, header *pb.UploadDatasetHeader, onProgress func(UploadProgress),
) (*pb.Dataset, error) {
	digest, total, err := measured(data)
	if err != nil {
		return nil, err
	}
	known, err := c.GetDataset(ctx, "sha256:"+digest)
	if err == nil && known.GetFormat() == header.GetFormat() {
		return known, nil
	}
	if err != nil && !errors.Is(err, NotFound) {
		return nil, err
	}
	first := &pb.UploadDatasetHeader{Name: header.GetName(), Format: header.GetFormat(), Sha256: digest}
	retry := c.streamRetry()
	for {
		sending := &sending{data: data, header: first, total: total, onProgress: onProgress}
		dataset, lost, err := c.send(ctx, sending)
		if err != nil {
			return nil, err
		}
		if lost == nil {
			retry.heard()
			return dataset, nil
		}
		if !connectionLost(lost) {
			return nil, lost
		}
		if err := retry.wait(ctx, lost); err != nil {
			return nil, err
		}
	}
}

func measured(data io.ReadSeeker) (digest string, total int64, err error) {
	if _, err = data.Seek(0, io.SeekStart); err != nil {
		return "", 0, err
	}
	hash := sha256.New()
	total, err = io.Copy(hash, data)
	return hex.EncodeToString(hash.Sum(nil)), total, err
}

// sending is one attempt at an upload.
type sending struct {
	data       io.ReadSeeker
	header     *pb.UploadDatasetHeader
	total      int64
	onProgress func(UploadProgress)
}

// send returns the dataset, or what the server or the connection said, or the error of reading data.
func (c *Client) send(ctx context.Context, s *sending) (*pb.Dataset, *Error, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // nothing is kept of an upload that breaks off
	stream, err := c.stub.UploadDataset(ctx)
	if err != nil {
		return nil, c.translated(ctx, err), nil
	}
	readError, sendError := s.parts(stream.Send)
	if readError != nil {
		return nil, nil, readError
	}
	if sendError != nil && !errors.Is(sendError, io.EOF) {
		return nil, c.translated(ctx, sendError), nil
	}
	response, err := stream.CloseAndRecv() // after io.EOF, too: it says why the server wants no more
	return response.GetDataset(), c.translated(ctx, err), nil
}

func (s *sending) parts(send func(*pb.UploadDatasetRequest) error) (readError, sendError error) {
	if _, err := s.data.Seek(0, io.SeekStart); err != nil {
		return err, nil
	}
	header := &pb.UploadDatasetRequest{Part: &pb.UploadDatasetRequest_Header{Header: s.header}}
	if err := send(header); err != nil {
		return nil, err
	}
	buffer := make([]byte, chunkBytes)
	for done := int64(0); ; {
		count, err := io.ReadFull(s.data, buffer)
		if count > 0 {
			chunk := &pb.UploadDatasetRequest{Part: &pb.UploadDatasetRequest_Chunk{Chunk: buffer[:count]}}
			if err := send(chunk); err != nil {
				return nil, err
			}
			done += int64(count)
			if s.onProgress != nil {
				s.onProgress(UploadProgress{done, s.total})
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}

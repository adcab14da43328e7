"""A small CT series as written by scanners, with patient data."""

import numpy as np
import pydicom


def write_series(folder, slices=6, rows=8, columns=9, z_step=3.0):
    """Writes a CT as single-slice files; returns their headers, ordered by position."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    series, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    made = []
    for z in range(slices):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        header.SeriesInstanceUID, header.StudyInstanceUID, header.FrameOfReferenceUID = series, study, frame
        header.Modality, header.InstanceNumber, header.SeriesNumber = "CT", z + 1, 2
        header.PatientName, header.PatientID, header.PatientBirthDate = "Doe^Jane", "123", "19700101"
        header.PatientSex, header.StudyDate, header.StudyTime, header.StudyID = "F", "20200101", "", "1"
        header.AccessionNumber, header.ReferringPhysicianName, header.InstitutionName = "", "", "A Hospital"
        header.Rows, header.Columns = rows, columns
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation = 15, 1
        header.RescaleSlope, header.RescaleIntercept = 1, 0
        header.ImagePositionPatient = [-40, -30, -20 + z * z_step]
        header.ImageOrientationPatient, header.PixelSpacing = [1, 0, 0, 0, 1, 0], [2, 2]
        header.SliceThickness = z_step
        header.PixelData = rng.integers(-1000, 1000, (rows, columns)).astype("<i2").tobytes()
        # Shuffled names: files and slices have different orders.
        header.save_as(folder / f"{(z * 7) % slices:02}.dcm", enforce_file_format=True)
        made.append(header)
    return made
